"""The finished listing of a collection: every image once, with its id. See :mod:`icce_ray.images.list_images`."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import count, islice, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.config import EmbeddingsConfig, ImagesConfig
from icce_ray.store import Artifact, Folder

LISTING_PREFIX = "images"
SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("problem", pa.string()),
    ]
)
REMOVED = "removed"
"""The problem of an image that a refresh did not find any more."""


class ListedImage(NamedTuple):
    """A row of the listing."""

    image_id: int
    uri: str
    size_bytes: int | None
    """None if unknown."""
    etag: str | None
    """Object stores: the ETag. Local files: the modification time in ns. Images in a container have the container's."""
    problem: str | None = None
    """Why the image cannot be used, if that is known already: it becomes a row of the errors table."""


class Entry(NamedTuple):
    """The same before it has an id."""

    uri: str
    size_bytes: int | None = None
    etag: str | None = None
    problem: str | None = None


ENTRY_SCHEMA = pa.schema(list(SCHEMA)[1:])
BATCH_ROWS = 8192
IDS_FOLDER = "ids"
FIRST_ID = "first_id"
"""The metric of assignments that says where their ids start."""
IDS_PER_SOURCE = 2**40
FEW_SOURCES = 2**13 - 1
"""Numbers to choose from at first: with them all ids are below 2^53, which float64 holds exactly."""
MAX_SOURCES = 2**22


def entry_tables(entries: Iterable[Entry]) -> Iterator[pa.Table]:
    """The entries in tables; at least one."""
    waiting = iter(entries)
    yield ENTRY_SCHEMA.empty_table()
    while batch := list(islice(waiting, BATCH_ROWS)):
        columns = zip(zip(*batch, strict=True), ENTRY_SCHEMA.types, strict=True)
        yield pa.table([pa.array(column, kind) for column, kind in columns], schema=ENTRY_SCHEMA)


def numbered(entries: pa.Table, start: int = 0) -> pa.Table:
    """A part of the listing: the entries with the ids from `start` on."""
    ids = pa.array(np.arange(start, start + len(entries)))
    return entries.add_column(0, SCHEMA.field("image_id"), ids).combine_chunks()


class Listing:
    """Reads a finished listing by image id. Keeps one part in memory."""

    def __init__(self, images: Artifact) -> None:
        names = images.part_names(LISTING_PREFIX)
        self._starts = np.cumsum([0, *images.num_rows(LISTING_PREFIX)])
        self._part = lru_cache(1)(lambda index: images.read_table(names[index]))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def table(self, start: int, stop: int) -> pa.Table:
        """The rows ``start <= image_id < stop``, with the columns of SCHEMA. Raises DamagedArtifactError: a part is
        missing or damaged."""
        tables, stop = list[pa.Table](), min(stop, len(self))
        while start < stop:
            index = int(np.searchsorted(self._starts, start, side="right")) - 1
            end = min(stop, int(self._starts[index + 1]))
            tables.append(self._part(index).slice(start - int(self._starts[index]), end - start))
            start = end
        return pa.concat_tables(tables) if tables else SCHEMA.empty_table()

    def rows(self, start: int, stop: int) -> list[ListedImage]:
        """The same rows as tuples."""
        columns = self.table(start, stop).to_pydict()
        return [ListedImage(*row) for row in zip(*columns.values(), strict=True)]

    def uris(self, image_ids: npt.NDArray[np.int64]) -> pa.ChunkedArray:
        """The URIs of images, given ascending, one part of the listing after the other."""
        chunks: list[pa.Array] = []
        edges = np.searchsorted(image_ids, self._starts).tolist()
        for start, (first, last) in zip(self._starts.tolist(), pairwise(edges), strict=False):
            if first < last:
                ids = image_ids[first:last]
                chunks += self.table(start, int(ids[-1]) + 1)["uri"].take(pa.array(ids - start)).chunks
        return pa.chunked_array(chunks, pa.string())

    def uri(self, image_id: int) -> str:
        uri: str = self.table(image_id, image_id + 1)["uri"][0].as_py()
        return uri


def has_ids_of(images: Artifact, earlier: Artifact) -> bool:
    """Whether an image of both listings has the same id in them."""
    return earlier.fingerprint in (images.fingerprint, *images.metrics.get("continues", ()))


def first_id(output: str, images: ImagesConfig, embeddings: EmbeddingsConfig) -> int:
    """The id of the first image of a source of new images. All images of an output share one space of ids: those of a
    run count from 0, those of each source of new images from a multiple of IDS_PER_SOURCE.

    ``ids/004711`` holds the settings of the source whose ids count from 4711 x IDS_PER_SOURCE, so that a source that is
    listed again keeps its ids. A hash of the settings chooses the number, so nothing else has to be read.
    """
    own = json.dumps([images.model_dump(mode="json"), embeddings.model_dump(mode="json")], sort_keys=True).encode()
    folder = Folder.at(output) / IDS_FOLDER
    for attempt in count():  # another number if this one is taken; after each eight from twice as many
        digest = hashlib.sha256(b"%d" % attempt + own).digest()
        number = 1 + int.from_bytes(digest[:8], "big") % min(FEW_SOURCES << attempt // 8, MAX_SOURCES)
        name = f"{number:06d}"
        try:
            folder.create_bytes(name, own)
            break
        except FileExistsError:
            if folder.read_bytes(name) == own:
                break
    return number * IDS_PER_SOURCE
