"""The images of a finished run that are exported: rows of its assignments, their features, and their files."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from icce_ray.assign.embeddings_to_label import EmbeddedImages
from icce_ray.assign.part_labeler import ASSIGNMENTS_FOLDER
from icce_ray.corrections.stage import applied_corrections
from icce_ray.errors import InputError
from icce_ray.images.containers import locate
from icce_ray.images.image_formats import IMAGE_ENDINGS
from icce_ray.images.uris import is_remote
from icce_ray.pipeline.find_run import stage_of_run
from icce_ray.store import Artifact

READ_TOGETHER = 32
"""Image files that are held at a time."""
MAX_NAME_CHARACTERS = 60
"""With four bytes for each, a name with its id and ending stays below the 255 bytes that file systems allow."""
EXTENSIONS = {"jpeg": "jpg", "tiff": "tif", "jpeg2000": "jp2"}

T = TypeVar("T")
Row = dict[str, Any]
"""A row of the assignments."""
MAX_DIGITS = 6
"""The most digits that a cluster's number may have on the command line."""


@dataclass(frozen=True)
class Selection:
    """Which images of a run are exported."""

    clusters: tuple[int, ...] | None = None
    """Only these clusters; None for all."""
    min_agreement: float | None = None
    """Only images at least this agreed on. An image outside the sample has no agreement, and is left out."""

    @classmethod
    def parse(cls, clusters: str | None, min_agreement: float | None) -> Selection:
        """From the command line: ``3,7-9`` are the clusters 3, 7, 8 and 9. Raises InputError: clusters that are not
        written like that, or an agreement that is not from 0 to 1."""
        if min_agreement is not None and not 0.0 <= min_agreement <= 1.0:
            raise InputError(f"--min-agreement {min_agreement:g}: allowed is 0 to 1")
        if clusters is None:
            return cls(None, min_agreement)
        chosen: set[int] = set()
        for span in clusters.split(","):
            first, _, last = span.strip().partition("-")
            if not first.isdecimal() or not (last or first).isdecimal():
                raise InputError(f"--clusters {clusters}: write numbers and ranges, such as 3,7-9")
            if max(len(first), len(last)) > MAX_DIGITS:
                raise InputError(f"--clusters {clusters[:40]}: a number has at most {MAX_DIGITS} digits")
            chosen.update(range(int(first), int(last or first) + 1))
        return cls(tuple(sorted(chosen)), min_agreement)

    def rows_of(self, table: pa.Table) -> npt.NDArray[np.int64]:
        """Rows of the table that are selected, ascending."""
        chosen = pa.array(np.ones(len(table), dtype=bool))
        if self.clusters is not None:
            chosen = pc.and_(chosen, pc.is_in(table["cluster"], pa.array(self.clusters, pa.int32())))
        if self.min_agreement is not None:
            chosen = pc.and_(chosen, pc.fill_null(pc.greater_equal(table["agreement"], self.min_agreement), False))
        return np.flatnonzero(chosen.to_numpy(zero_copy_only=False))


class SelectedImages:
    """Reads the selected images of a run, given by its config, output folder or record, in the order of their ids, part
    by part. Raises InputError: there is no such run, or a cluster of the selection does not exist."""

    def __init__(self, run: str, selection: Selection) -> None:
        self.assign, _ = stage_of_run(run, "assign", what="assignments")
        self.selection = selection
        self._run = run
        self.num_clusters = len(self.assign.metrics["cluster_sizes"])
        beyond = [cluster for cluster in selection.clusters or () if cluster >= self.num_clusters]
        if beyond:
            raise InputError(f"--clusters: there is no cluster {beyond[0]}; the last one is {self.num_clusters - 1}")
        is_corrected = "corrections" in self.assign.manifest.inputs
        applied = applied_corrections({"corrections": self.find("corrections")} if is_corrected else {}) or {}
        self.names = {row["cluster"]: row["name"] for row in applied.get("clusters", ()) if row.get("name")}
        """Names that a person gave to clusters on the page."""
        plain = {cluster: self.names.get(cluster, str(cluster)) for cluster in range(self.num_clusters)}
        times = Counter(plain.values())
        self.labels = {cluster: f"{name} ({cluster})" if times[name] > 1 else name for cluster, name in plain.items()}
        """The name of each cluster, or its number if it has none. No two are the same."""
        self.schema: pa.Schema = next(self._parts()).schema
        """Columns of the assignments."""

    def _parts(self) -> Iterator[pa.Table]:
        yield from map(self.assign.read_table, self.assign.part_names(ASSIGNMENTS_FOLDER))

    def tables(self) -> Iterator[pa.Table]:
        """The selected rows of the assignments, a table for each part."""
        for table in self._parts():
            yield table.take(pa.array(self.selection.rows_of(table)))

    def rows(self) -> Iterator[Row]:
        for table in self.tables():
            yield from table.to_pylist()

    def count(self) -> int:
        return sum(len(self.selection.rows_of(table)) for table in self._parts())

    def find(self, stage: str) -> Artifact:
        """The artifact of another stage of the run."""
        return stage_of_run(self._run, stage)[0]

    def tables_with_features(self) -> Iterator[tuple[pa.Table, npt.NDArray[Any]]]:
        """Selected rows, and their features (n, D), a few thousand at a time."""
        source = EmbeddedImages(self.find("embed"), self.find("images"))
        for part, table in zip(source.plan(), self._parts(), strict=True):
            start = 0
            for image_ids, features_nD, *_ in source.read(part):
                block = table.slice(start, len(image_ids))
                start += len(image_ids)
                rows = self.selection.rows_of(block)
                yield block.take(pa.array(rows)), features_nD[rows]


def map_rows(function: Callable[[Row], T], rows: Iterable[Row]) -> Iterator[tuple[Row, T]]:
    """Each row and what the function returns for it, in order. Few rows are worked on at a time."""
    waiting = iter(rows)
    with ThreadPoolExecutor(READ_TOGETHER) as threads:
        while batch := list(islice(waiting, READ_TOGETHER)):
            yield from zip(batch, threads.map(function, batch), strict=True)


def is_local_file(uri: str) -> bool:
    """Whether the image is a file of its own on this machine, which can be linked to."""
    return not is_remote(uri) and not uri.startswith("file://") and locate(uri) is None


def extension(uri: str, data: bytes = b"") -> str:
    """The ending of an image file without its dot: that of its name, or of its format."""
    suffix = PurePosixPath(uri).suffix.lower()
    if suffix in IMAGE_ENDINGS:
        return suffix[1:]
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = (image.format or "bin").lower()
    except OSError:
        return "bin"
    return EXTENSIONS.get(kind, kind)


def file_name(row: Row) -> str:
    """A name without ending that is allowed everywhere and that no other image has: the image's own with its id."""
    return f"{safe_name(PurePosixPath(row['uri']).stem) or 'image'}-{row['image_id']}"


def safe_name(text: str) -> str:
    """Letters, digits, ``_`` and ``-`` of a text, for the name of a file or folder; may be empty."""
    return re.sub(r"[^\w-]+", "_", text).strip("_-")[:MAX_NAME_CHARACTERS]
