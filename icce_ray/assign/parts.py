"""One part of the assignments: some consecutive embedding parts, labelled and written, with a note that it is finished.

For each ``assignments/part-*.parquet`` there is a ``part-*.done.json`` with what it was made from, so a run that was
killed takes up exactly the parts that are whole and still right. The folder ``assignments`` holds nothing but Parquet:
pandas reads it as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from icce_ray.assign.labeling import assignments_table, label_images
from icce_ray.classifier.linear import LinearClassifier
from icce_ray.embed.features import table_to_arrays
from icce_ray.embed.listing import Listing
from icce_ray.errors import WorkerError
from icce_ray.store import Artifact, ArtifactWriter, Folder, Part

ASSIGNMENTS_FOLDER = "assignments/"


@dataclass(frozen=True)
class AssignPart:
    """What one part covers."""

    name: str
    inputs: tuple[str, ...]
    """Embedding parts, in order."""
    first_row: int
    """Row of the embedding matrix, which the consensus counts by."""
    num_rows: int
    source: str
    """Digest of everything the part is made from."""


@dataclass(frozen=True)
class Tally:
    """Figures of one part or of several added up."""

    num_images: int = 0
    num_in_consensus: int = 0
    num_outliers: int = 0
    num_exemplars: int = 0
    sum_confidence: float = 0.0
    cluster_sizes: dict[str, int] | None = None
    """Images by cluster; the keys are strings, as JSON has it."""

    def __add__(self, other: Tally) -> Tally:
        sizes = Counter(self.cluster_sizes or {}) + Counter(other.cluster_sizes or {})
        return Tally(
            self.num_images + other.num_images,
            self.num_in_consensus + other.num_in_consensus,
            self.num_outliers + other.num_outliers,
            self.num_exemplars + other.num_exemplars,
            self.sum_confidence + other.sum_confidence,
            dict(sizes),
        )

    def metrics(self, num_clusters: int) -> dict[str, Any]:
        sizes_K = [(self.cluster_sizes or {}).get(str(cluster), 0) for cluster in range(num_clusters)]
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

    @classmethod
    def find(cls, folder: Folder, wanted: AssignPart) -> FinishedPart | None:
        """The part, or None where it was not finished, is of another size, or was made from something else."""
        try:
            note = json.loads(folder.read_bytes(note_name(wanted.name)))
            finished = cls.from_json(note)
        except (FileNotFoundError, ValueError, KeyError, TypeError, ValidationError):
            return None
        whole = folder.size(wanted.name) == finished.part.num_bytes
        return finished if note["source"] == wanted.source and whole else None

    def to_json(self, source: str) -> dict[str, Any]:
        return {"source": source, "part": self.part.model_dump(mode="json"), "tally": asdict(self.tally)}

    @classmethod
    def from_json(cls, note: dict[str, Any]) -> FinishedPart:
        return cls(Part(**note["part"]), Tally(**note["tally"]))


class UriReader:
    """URIs by image id from the images artifact, shard by shard."""

    def __init__(self, images: Artifact) -> None:
        self._listing = Listing(images)

    def read(self, image_ids: npt.NDArray[np.int64]) -> pa.ChunkedArray:
        """The URIs of (n,) ascending ids."""
        if not len(image_ids):
            return pa.chunked_array([], type=pa.string())
        first = int(image_ids[0])
        return self._listing.table(first, int(image_ids[-1]) + 1)["uri"].take(pa.array(image_ids - first))


def note_name(part_name: str) -> str:
    return part_name.removeprefix(ASSIGNMENTS_FOLDER).removesuffix(".parquet") + ".done.json"


def tries_name(part_name: str) -> str:
    return part_name.removeprefix(ASSIGNMENTS_FOLDER).removesuffix(".parquet") + ".tries.json"


def begin_try(wanted: AssignPart, folder: Folder, run_id: str, max_tries: int) -> None:
    """Note on storage that a process of the run starts on the part; :func:`write_part` takes the note away.

    Raises:
        WorkerError: `max_tries` processes of this run have started on it, and none came to its end.
    """
    name = tries_name(wanted.name)
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


def plan_parts(embed: Artifact, rows_per_part: int, source: Iterable[str]) -> list[AssignPart]:
    """Consecutive embedding parts, joined to at most `rows_per_part` rows each (more where a single one has more).

    Args:
        source: checksums and settings that every part depends on.
    """
    shared = list(source)
    groups: list[list[str]] = []
    room = 0
    for name in embed.part_names("part-"):
        rows = embed.part(name).rows or 0
        if rows > room or not groups:
            groups.append([])
            room = rows_per_part
        groups[-1].append(name)
        room -= rows
    parts, first_row = [], 0
    for index, names in enumerate(groups):
        content = [*shared, *(embed.part(name).sha256 for name in names)]
        digest = hashlib.sha256(json.dumps([content, first_row]).encode()).hexdigest()[:16]
        num_rows = sum(embed.part(name).rows or 0 for name in names)
        parts.append(
            AssignPart(f"{ASSIGNMENTS_FOLDER}part-{index:05d}.parquet", tuple(names), first_row, num_rows, digest)
        )
        first_row += num_rows
    return parts


def write_part(
    wanted: AssignPart,
    folder: Folder,
    *,
    embed: Artifact,
    uris: UriReader,
    classifier: LinearClassifier,
    consensus_N: npt.NDArray[np.integer],
    agreement_N: npt.NDArray[np.floating],
    exemplar_rows: npt.NDArray[np.int64],
) -> FinishedPart:
    """Label the images of a part, write it, then the note that it is finished.

    Args:
        consensus_N: labels by row of the embedding matrix, -1 for images that took no part.
        exemplar_rows: ascending rows of the embedding matrix.
    """
    tables, tally, row = [], Tally(), wanted.first_row
    for name in wanted.inputs:
        image_ids, features_nD = table_to_arrays(embed.read_table(name))
        rows = slice(row, row + len(image_ids))
        labels = label_images(classifier, features_nD, np.asarray(consensus_N[rows]), np.asarray(agreement_N[rows]))
        is_exemplar = np.isin(np.arange(rows.start, rows.stop), exemplar_rows)
        tables.append(assignments_table(image_ids, uris.read(image_ids).combine_chunks(), labels, is_exemplar))
        clusters, counts = np.unique(labels.cluster, return_counts=True)
        tally += Tally(
            num_images=len(image_ids),
            num_in_consensus=int(np.isfinite(labels.agreement).sum()),
            num_outliers=int(labels.is_outlier.sum()),
            num_exemplars=int(is_exemplar.sum()),
            sum_confidence=float(labels.confidence.sum(dtype=np.float64)),
            cluster_sizes={str(cluster): int(count) for cluster, count in zip(clusters, counts, strict=True)},
        )
        row = rows.stop
    finished = FinishedPart(ArtifactWriter(folder).write_table(wanted.name, pa.concat_tables(tables)), tally)
    folder.write_bytes(note_name(wanted.name), json.dumps(finished.to_json(wanted.source)).encode())
    folder.remove(tries_name(wanted.name))
    return finished
