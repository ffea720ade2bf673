"""Where the rows to be labelled come from: the embedding artifact of a run, or files of ready-made embeddings.

A source cuts all rows into parts, and reads one part a few thousand rows at a time. It pickles: the driver plans, the
workers read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from icce_ray.assign.assignment_parts import ASSIGNMENTS_FOLDER, AssignPart
from icce_ray.config import EmbeddingsConfig
from icce_ray.embed.feature_matrix import PART_PREFIX, table_to_arrays
from icce_ray.images.embedding_files import EmbeddingFile, Embeddings, NpyEmbeddings, ParquetEmbeddings, open_embeddings
from icce_ray.images.listing import LISTING_PREFIX, Listing
from icce_ray.store import Artifact

READ_ROWS = 8_192

Rows = tuple[npt.NDArray[np.int64], npt.NDArray[Any], pa.ChunkedArray]
"""image_ids (n,), features (n, D), uris (n,)."""


class Source(Protocol):
    def plan(self, rows_per_part: int, made_from: Iterable[str]) -> list[AssignPart]:
        """All rows in parts of about `rows_per_part`.

        Args:
            made_from: checksums and settings that every part depends on besides its rows.
        """

    def read(self, part: AssignPart) -> Iterator[Rows]:
        """The rows of a part, in order."""


class EmbeddedImages:
    """The images of an ``embed`` artifact; a part is some of its parts, joined."""

    def __init__(self, embed: Artifact, images: Artifact) -> None:
        self.embed = embed
        self.images = images

    def plan(self, rows_per_part: int, made_from: Iterable[str]) -> list[AssignPart]:
        shared = [*made_from, *(self.images.part(name).sha256 for name in self.images.part_names(LISTING_PREFIX))]
        groups: list[list[str]] = []
        room = 0
        for name in self.embed.part_names(PART_PREFIX):
            rows = self.embed.part(name).rows or 0
            if rows > room or not groups:
                groups.append([])
                room = rows_per_part
            groups[-1].append(name)
            room -= rows
        parts, first_row = [], 0
        for index, names in enumerate(groups):
            content = [shared, [self.embed.part(name).sha256 for name in names], first_row]
            num_rows = sum(self.embed.part(name).rows or 0 for name in names)
            parts.append(AssignPart(_part_name(index), tuple(names), first_row, num_rows, _digest(content)))
            first_row += num_rows
        return parts

    def read(self, part: AssignPart) -> Iterator[Rows]:
        for name in part.inputs:
            image_ids, features_nD = table_to_arrays(self.embed.read_table(name))
            yield image_ids, features_nD, self._uris.read(image_ids)

    def __getstate__(self) -> dict[str, Any]:
        return {"embed": self.embed, "images": self.images}

    @cached_property
    def _uris(self) -> UriReader:
        return UriReader(self.images)


class EmbeddingFiles:
    """Ready-made embeddings, read where they lie. The id of an image is its row, counted over all files.

    Args:
        config: which files and which column.
        uri_column: the column with the images' URIs, where the files have it.

    Raises:
        InputError: as :func:`open_embeddings`.
    """

    def __init__(self, config: EmbeddingsConfig, uri_column: str) -> None:
        opened = open_embeddings(config)
        self.files = opened.files
        self.num_rows = opened.num_rows
        self.dim = opened.dim
        self.column = opened.column if isinstance(opened, ParquetEmbeddings) else None
        self.uri_column = uri_column

    def plan(self, rows_per_part: int, made_from: Iterable[str]) -> list[AssignPart]:
        shared = [*made_from, self.column, self.uri_column]
        parts: list[AssignPart] = []
        first_row = 0
        for index, file in enumerate(self.files):
            start = 0
            for num_rows in _cuts(_pieces(file), rows_per_part):
                content = [shared, file.uri, file.size_bytes, file.mtime_ns, start, num_rows, first_row]
                name = _part_name(len(parts))
                parts.append(AssignPart(name, (str(index),), first_row, num_rows, _digest(content), start))
                start += num_rows
                first_row += num_rows
        return parts

    def read(self, part: AssignPart) -> Iterator[Rows]:
        opened = self._open(self.files[int(part.inputs[0])])
        uris = opened.uris(self.uri_column, part.start, part.start + part.num_rows)
        done = 0
        for block in opened.blocks(READ_ROWS, start=part.start):
            features_nD = block[: part.num_rows - done]
            image_ids = np.arange(part.first_row + done, part.first_row + done + len(features_nD))
            yield image_ids, features_nD, uris.slice(done, len(features_nD))
            done += len(features_nD)
            if done == part.num_rows:
                return

    def _open(self, file: EmbeddingFile) -> Embeddings:
        return ParquetEmbeddings([file], self.column) if self.column is not None else NpyEmbeddings(file)


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


def _pieces(file: EmbeddingFile) -> list[int]:
    """Rows of the pieces of a file that can be read by themselves: row groups; of a .npy file any rows."""
    if file.path.lower().endswith(".npy"):
        num_rows = NpyEmbeddings(file).num_rows
        return [min(READ_ROWS, num_rows - start) for start in range(0, num_rows, READ_ROWS)]
    with file.filesystem.open_input_file(file.path) as opened:
        metadata = pq.read_metadata(opened)
    return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


def _cuts(pieces: list[int], rows_per_part: int) -> list[int]:
    """Consecutive pieces joined to at most `rows_per_part` rows, more only where a single piece has more."""
    cuts: list[int] = []
    for num_rows in pieces:
        if cuts and cuts[-1] + num_rows <= rows_per_part:
            cuts[-1] += num_rows
        elif num_rows:
            cuts.append(num_rows)
    return cuts


def _part_name(index: int) -> str:
    return f"{ASSIGNMENTS_FOLDER}part-{index:05d}.parquet"


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
