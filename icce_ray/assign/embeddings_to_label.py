"""The embeddings to be labelled: a run's embedding artifact, or files of ready-made embeddings.

Both divide their rows into parts and read a part a few thousand rows at a time. They pickle: the driver plans, the
workers read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from icce_ray.config import EmbeddingsConfig
from icce_ray.embed.feature_matrix import PART_PREFIX, table_to_arrays
from icce_ray.embed.finished_parts import ERRORS_SCHEMA
from icce_ray.images.embedding_files import (
    EmbeddingFile,
    NpyEmbeddings,
    ParquetEmbeddings,
    open_embeddings,
)
from icce_ray.images.listing import LISTING_PREFIX, Listing
from icce_ray.store import Artifact

READ_ROWS = 8_192
MIN_ROWS_PER_PART, MAX_ROWS_PER_PART = 32_768, 131_072
"""Within these bounds there are 32 parts: enough for many workers, each part worth the files it takes."""


class Rows(NamedTuple):
    """Some images of a part."""

    image_ids: npt.NDArray[np.int64]
    features_nD: npt.NDArray[Any]
    uris: pa.ChunkedArray
    errors: pa.Table | None = None
    """Rows beside them that cannot be used, as ERRORS_SCHEMA."""


@dataclass(frozen=True)
class AssignPart:
    """The rows of one part of the assignments."""

    name: str
    inputs: tuple[str, ...]
    """What to read, in order: parts of the embedding artifact, or the index of a file of ready-made embeddings."""
    first_row: int
    """Row of the embedding matrix."""
    num_rows: int
    start: int = 0
    """First row within the file of ready-made embeddings."""


class EmbeddedImages:
    """The images of an ``embed`` artifact. A part joins some of its parts."""

    def __init__(self, embed: Artifact, images: Artifact) -> None:
        self.embed = embed
        self.images = images
        self.num_rows = int(embed.num_rows(PART_PREFIX).sum())

    def identity(self) -> list[Any]:
        """JSON-able: changes when the rows or their URIs do."""
        return [self.embed.checksum(PART_PREFIX), self.images.checksum(LISTING_PREFIX)]

    def plan(self) -> list[AssignPart]:
        """All rows in parts."""
        names, sizes = self.embed.part_names(PART_PREFIX), self.embed.num_rows(PART_PREFIX).tolist()
        parts: list[AssignPart] = []
        first_row = 0
        for group in _joined(sizes, _rows_per_part(self.num_rows)):
            num_rows = sum(sizes[index] for index in group)
            parts.append(AssignPart(_part_name(len(parts)), tuple(names[i] for i in group), first_row, num_rows))
            first_row += num_rows
        return parts

    def read(self, part: AssignPart) -> Iterator[Rows]:
        """The rows of a part, in order."""
        for name in part.inputs:
            image_ids, features_nD = table_to_arrays(self.embed.read_table(name))
            yield Rows(image_ids, features_nD, self._listing.uris(image_ids))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_listing"}

    @cached_property
    def _listing(self) -> Listing:
        return Listing(self.images)


class EmbeddingFiles:
    """Files of ready-made embeddings, read in place. The id of an image is its row, counted over all files. Its URI is
    in `uri_column`, in files that have it. Raises InputError: as :func:`open_embeddings`."""

    def __init__(self, config: EmbeddingsConfig, uri_column: str) -> None:
        opened = open_embeddings(config)
        self.files = opened.files
        self.num_rows = opened.num_rows
        self.dim = opened.dim
        self.column = opened.column if isinstance(opened, ParquetEmbeddings) else None
        self.uri_column = uri_column

    def identity(self) -> list[Any]:
        return [self.column, self.uri_column, [[file.uri, file.size_bytes, file.mtime_ns] for file in self.files]]

    def plan(self) -> list[AssignPart]:
        parts: list[AssignPart] = []
        first_row = 0
        for index, file in enumerate(self.files):
            start = 0
            row_groups = _row_groups(file)
            for group in _joined(row_groups, _rows_per_part(self.num_rows)):
                num_rows = sum(row_groups[i] for i in group)
                if num_rows:
                    parts.append(AssignPart(_part_name(len(parts)), (str(index),), first_row, num_rows, start))
                start += num_rows
                first_row += num_rows
        return parts

    def read(self, part: AssignPart) -> Iterator[Rows]:
        file = self.files[int(part.inputs[0])]
        opened = NpyEmbeddings(file) if self.column is None else ParquetEmbeddings([file], self.column, self.dim)
        uris = opened.uris(self.uri_column, part.start, part.start + part.num_rows)
        done = 0
        for block in opened.blocks(READ_ROWS, start=part.start):
            block = block.part(0, part.num_rows - done)
            good, problems = block.is_usable_n, block.problems()
            image_ids = np.arange(part.first_row + done, part.first_row + done + len(good))
            named = uris.slice(done, len(good))
            bad = [image_ids[~good], named.filter(pa.array(~good)), list(problems.values())]
            errors = pa.table(bad, schema=ERRORS_SCHEMA) if problems else None
            yield Rows(image_ids[good], block.rows_nD[good], named.filter(pa.array(good)), errors)
            done += len(good)
            if done == part.num_rows:
                return


Source = EmbeddedImages | EmbeddingFiles


def _row_groups(file: EmbeddingFile) -> list[int]:
    """Rows of each row group of a Parquet file. A .npy file has none, and can be read from any row."""
    if file.path.lower().endswith(".npy"):
        num_rows = NpyEmbeddings(file).num_rows
        return [min(READ_ROWS, num_rows - start) for start in range(0, num_rows, READ_ROWS)]
    with file.filesystem.open_input_file(file.path) as opened:
        metadata = pq.read_metadata(opened)
    return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


def _rows_per_part(num_rows: int) -> int:
    return min(max(num_rows // 32, MIN_ROWS_PER_PART), MAX_ROWS_PER_PART)


def _joined(sizes: list[int], max_rows: int) -> list[range]:
    """Consecutive items joined to at most `max_rows` rows, more only if a single item has more. Empty items join."""
    groups: list[range] = []
    room = 0
    for index, num_rows in enumerate(sizes):
        if groups and num_rows <= room:
            groups[-1] = range(groups[-1].start, index + 1)
        else:
            groups.append(range(index, index + 1))
            room = max_rows
        room = max(0, room - num_rows)
    return groups


def _part_name(index: int) -> str:
    return f"part-{index:05d}"
