"""One part of the assignments: some consecutive rows, labelled and written, with a note that it is finished.

For each ``assignments/part-*.parquet`` there is a ``part-*.done.json`` with what it was made from, so a run that was
killed takes up exactly the parts that are whole and still right. The folder ``assignments`` holds nothing but Parquet:
pandas reads it as it is.
"""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from icce_ray.classifier.linear import NUM_CONFIDENCE_BINS, Prediction, confidence_histogram
from icce_ray.errors import WorkerError
from icce_ray.store import ArtifactWriter, Folder, Part

ASSIGNMENTS_FOLDER = "assignments/"


@dataclass(frozen=True)
class AssignPart:
    """What one part covers."""

    name: str
    inputs: tuple[str, ...]
    """What to read, in order: parts of the embedding artifact, or one file of ready-made embeddings."""
    first_row: int
    """Row of the embedding matrix, which the consensus counts by."""
    num_rows: int
    source: str
    """Digest of everything the part is made from."""
    start: int = 0
    """First row within a file of ready-made embeddings."""

    @property
    def stem(self) -> str:
        """The name without folder and ending: what lies beside the part is named by it."""
        return self.name.removeprefix(ASSIGNMENTS_FOLDER).removesuffix(".parquet")


@dataclass(frozen=True)
class Tally:
    """Figures of one part or of several added up."""

    num_images: int = 0
    num_in_consensus: int = 0
    num_outliers: int = 0
    num_exemplars: int = 0
    sum_confidence: float = 0.0
    confidence_counts: tuple[int, ...] = (0,) * NUM_CONFIDENCE_BINS
    """Images by confidence, in equal steps from 0 to 1."""
    cluster_sizes: dict[str, int] | None = None
    """Images by cluster; the keys are strings, as JSON has it."""

    @classmethod
    def of(cls, prediction: Prediction, *, num_in_consensus: int = 0, num_exemplars: int = 0) -> Tally:
        clusters, counts = np.unique(prediction.cluster, return_counts=True)
        return cls(
            num_images=len(prediction.cluster),
            num_in_consensus=num_in_consensus,
            num_outliers=int(prediction.is_outlier.sum()),
            num_exemplars=num_exemplars,
            sum_confidence=float(prediction.confidence.sum(dtype=np.float64)),
            confidence_counts=tuple(confidence_histogram(prediction.confidence).tolist()),
            cluster_sizes={str(cluster): int(count) for cluster, count in zip(clusters, counts, strict=True)},
        )

    def __add__(self, other: Tally) -> Tally:
        sizes = Counter(self.cluster_sizes or {}) + Counter(other.cluster_sizes or {})
        counts = zip(self.confidence_counts, other.confidence_counts, strict=True)
        return Tally(
            self.num_images + other.num_images,
            self.num_in_consensus + other.num_in_consensus,
            self.num_outliers + other.num_outliers,
            self.num_exemplars + other.num_exemplars,
            self.sum_confidence + other.sum_confidence,
            tuple(one + another for one, another in counts),
            dict(sizes),
        )

    def sizes(self, num_clusters: int) -> list[int]:
        """Images of each of the K clusters."""
        return [(self.cluster_sizes or {}).get(str(cluster), 0) for cluster in range(num_clusters)]

    def metrics(self, num_clusters: int) -> dict[str, Any]:
        sizes_K = self.sizes(num_clusters)
        return {
            "num_images": self.num_images,
            "num_in_consensus": self.num_in_consensus,
            "num_outliers": self.num_outliers,
            "num_exemplars": self.num_exemplars,
            "mean_confidence": self.sum_confidence / max(self.num_images, 1),
            "num_clusters_used": sum(size > 0 for size in sizes_K),
            "cluster_sizes": sizes_K,
        }


@dataclass(frozen=True)
class FinishedPart:
    """A part that lies on storage."""

    part: Part
    tally: Tally
    beside: Part | None = None
    """What was written along with it, if anything."""

    @property
    def files(self) -> list[Part]:
        return [self.part] if self.beside is None else [self.part, self.beside]

    @classmethod
    def find(cls, folder: Folder, wanted: AssignPart) -> FinishedPart | None:
        """The part, or None where it was not finished, is of another size, or was made from something else."""
        try:
            note = json.loads(folder.read_bytes(note_name(wanted)))
            finished = cls.from_json(note)
        except (FileNotFoundError, ValueError, KeyError, TypeError, ValidationError):
            return None
        whole = all(folder.size(file.name) == file.num_bytes for file in finished.files)
        return finished if note["source"] == wanted.source and whole else None

    def to_json(self, source: str) -> dict[str, Any]:
        beside = self.beside.model_dump(mode="json") if self.beside else None
        return {
            "source": source,
            "part": self.part.model_dump(mode="json"),
            "tally": asdict(self.tally),
            "beside": beside,
        }

    @classmethod
    def from_json(cls, note: dict[str, Any]) -> FinishedPart:
        tally = note["tally"] | {"confidence_counts": tuple(note["tally"]["confidence_counts"])}
        return cls(Part(**note["part"]), Tally(**tally), Part(**note["beside"]) if note["beside"] else None)


def note_name(wanted: AssignPart) -> str:
    return f"{wanted.stem}.done.json"


def tries_name(wanted: AssignPart) -> str:
    return f"{wanted.stem}.tries.json"


def begin_try(wanted: AssignPart, folder: Folder, run_id: str, max_tries: int) -> None:
    """Note on storage that a process of the run starts on the part; :func:`finish_part` takes the note away.

    Raises:
        WorkerError: `max_tries` processes of this run have started on it, and none came to its end.
    """
    name = tries_name(wanted)
    try:
        note = json.loads(folder.read_bytes(name))
        tries = note["tries"] + 1 if note["run"] == run_id else 1
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        tries = 1
    if tries > max_tries:
        raise WorkerError(
            f"{wanted.num_rows:,} images killed their process {max_tries} times. Out of memory is the usual cause: "
            "lower resources.assign.num_workers or assign.rows_per_part"
        )
    note = {"run": run_id, "tries": tries, "host": socket.gethostname(), "pid": os.getpid()}
    folder.write_bytes(name, json.dumps(note).encode())


def finish_part(
    wanted: AssignPart, folder: Folder, table: pa.Table, tally: Tally, beside: tuple[str, pa.Table] | None = None
) -> FinishedPart:
    """Write the part and the table `beside` it (name, content), then the note that both are finished."""
    writer = ArtifactWriter(folder)
    second = writer.write_table(*beside) if beside is not None else None
    finished = FinishedPart(writer.write_table(wanted.name, table), tally, second)
    folder.write_bytes(note_name(wanted), json.dumps(finished.to_json(wanted.source)).encode())
    folder.remove(tries_name(wanted))
    return finished
