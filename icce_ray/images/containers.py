"""Containers of images: tar shards in WebDataset's layout, and Parquet files with a column of image files.

The URI of an image in a container says where it lies: ``shard.tar#<offset>+<bytes>/<name in the tar>`` or
``table.parquet#<row>/<column>``. So each image can be read alone: from a tar with one ranged request, from Parquet
with its row group.
"""

import io
import threading
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from icce_ray.config import ImagesConfig
from icce_ray.errors import InputError, message_of
from icce_ray.images import tar_shards
from icce_ray.images.file_kinds import ending
from icce_ray.images.file_shards import File
from icce_ray.images.image_formats import IMAGE_ENDINGS
from icce_ray.images.listing import Entry
from icce_ray.images.parquet_columns import PARQUET_ENDINGS, check_expansion, image_column, open_column
from icce_ray.images.uris import PARQUET_MEMBER, TAR_MEMBER, is_remote, open_file

MAX_OPEN_GROUPS = 2
MAX_LINKS = 8
"""Links of a tar that are followed from one to the next."""
LABEL_ENDING = ".cls"
MAX_LABEL_BYTES = 65_536
DAMAGED_NAME = "(damaged)"
"""Stands for the name of the member in the URI of damaged bytes."""


class Span(NamedTuple):
    """The bytes of a tar member."""

    file: str
    start: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.start + self.num_bytes

    def uri(self, name: str = "") -> str:
        """The URI of an image there."""
        return f"{self.file}#{self.start}+{self.num_bytes}/{name}"


class Cell(NamedTuple):
    """A cell of a Parquet file."""

    file: str
    row: int
    column: str


def locate(uri: str) -> Span | Cell | None:
    """The place of the image `uri` in its container, or None if it is a file of its own."""
    tar, parquet = TAR_MEMBER.match(uri), PARQUET_MEMBER.match(uri)
    if tar and not (parquet and len(parquet["file"]) < len(tar["file"])):
        return Span(tar["file"], int(tar["offset"]), int(tar["size"]))
    return Cell(parquet["file"], int(parquet["row"]), parquet["column"]) if parquet else None


def file_of(uri: str) -> str:
    """The file that holds the image `uri`: a container, or the image file itself."""
    place = locate(uri)
    return uri if place is None else place.file


def members(container: File, images: ImagesConfig, skipped: Counter[str]) -> Iterator[Entry]:
    """The images in a container, in its order. Only headers are read.

    What cannot be read is an entry with a problem. Links of a tar come last. What a tar holds besides images and labels
    is counted in `skipped`, by ending. Raises InputError: the column of images is not known, or remote storage refuses
    access. Raises WorkerError: it is away for too long."""
    uri = container.uri
    if not uri.lower().endswith(PARQUET_ENDINGS):
        yield from _tar_members(container, skipped)
        return
    try:
        with open_file(uri) as opened:
            file = pq.ParquetFile(opened)
            column, num_rows = image_column(file.schema_arrow, images, uri), file.metadata.num_rows
            if not 0 <= num_rows <= opened.size():
                raise OSError("absurd number of rows")
        yield from (Entry(f"{uri}#{row}/{column}", None, container.etag) for row in range(num_rows))
    except (pa.ArrowException, OSError) as error:
        problem = f"damaged Parquet file: {message_of(error)}"
        yield Entry(f"{uri}#0/{DAMAGED_NAME}", container.size_bytes, container.etag, problem)


def _tar_members(container: File, skipped: Counter[str]) -> Iterator[Entry]:
    uri, etag = container.uri, container.etag
    links = list[tar_shards.Link]()
    for found in _walk_tar(uri):
        if isinstance(found, tar_shards.Damage):
            place = Span(uri, found.start, found.num_bytes).uri(DAMAGED_NAME)
            yield Entry(place, found.num_bytes, etag, f"damaged shard: {found.reason}")
        elif PurePosixPath(found.name).name.startswith("."):
            skipped["hidden"] += 1
        elif (kind := ending(found.name)) not in IMAGE_ENDINGS:
            if kind != LABEL_ENDING:
                skipped[kind or "no ending"] += 1
        elif isinstance(found, tar_shards.Link):
            links.append(found)
        else:
            yield Entry(Span(uri, found.start, found.num_bytes).uri(found.name), found.num_bytes, etag)
    # A second walk, since keeping the place of every member would take memory for the sake of a few links.
    targets = {link.name: link.target for link in links}
    wanted, again = set(targets.values()), _walk_tar(uri) if links else ()
    places = {found.name: found for found in again if isinstance(found, tar_shards.Member) and found.name in wanted}
    for link in links:
        name = link.target
        for _ in range(MAX_LINKS):
            name = name if name in places else targets.get(name, name)
        if (target := places.get(name)) is not None:
            yield Entry(Span(uri, target.start, target.num_bytes).uri(link.name), target.num_bytes, etag)
        else:
            place = Span(uri, 0, 0).uri(link.name)
            yield Entry(place, None, etag, "missing: a link to a file that is not in the shard")


def labels_beside(uris: Sequence[str]) -> list[str | None]:
    """The label of each image of a tar shard: the text of the ``.cls`` file with the same key (the name up to its first
    dot), or None if there is none. Each shard is read once."""
    keys_by_tar: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, uri in enumerate(uris):
        if match := TAR_MEMBER.match(uri):
            keys_by_tar[match["file"]][_key(match["name"])].append(number)
    labels: list[str | None] = [None] * len(uris)
    for file, numbers_by_key in keys_by_tar.items():
        try:
            with _opened_tar(file) as (headers, num_bytes):
                for found in tar_shards.walk(headers, num_bytes):
                    if not isinstance(found, tar_shards.Member) or not found.name.lower().endswith(LABEL_ENDING):
                        continue
                    numbers = numbers_by_key.get(_key(found.name), ())
                    if numbers and found.num_bytes <= MAX_LABEL_BYTES:
                        headers.seek(found.start)
                        text = headers.read(found.num_bytes).decode("utf-8", "replace").strip()
                        for number in numbers:
                            labels[number] = text
        except OSError as error:
            raise InputError(f"evaluate.labels: the tar {file} cannot be read: {message_of(error)}") from None
    return labels


def _key(name: str) -> str:
    folder, _, base = name.removeprefix("./").rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _walk_tar(uri: str) -> Iterator[tar_shards.Member | tar_shards.Link | tar_shards.Damage]:
    """The members of a tar. A file that cannot be read is damage."""
    position = 0
    try:
        with _opened_tar(uri) as (headers, num_bytes):
            for found in tar_shards.walk(headers, num_bytes):
                position = found.start if isinstance(found, tar_shards.Member) else position
                yield found
    except FileNotFoundError:
        yield tar_shards.Damage(0, 0, "missing")
    except OSError as error:
        yield tar_shards.Damage(position, 0, f"unreadable: {message_of(error)}")


@contextmanager
def _opened_tar(uri: str) -> Iterator[tuple[Any, int]]:
    """A tar for :func:`tar_shards.walk`, and its size in bytes."""
    with open_file(uri) as file:
        yield tar_shards.RemoteHeaders(file) if is_remote(uri) else io.BufferedReader(file), file.size()


def read_cell(cell: Cell) -> bytes | str | None:
    """The cell's bytes; a string if it has the path of a file instead (``{bytes: null, path: ...}``); None if null.
    Raises IndexError: the file has fewer rows; OSError, pa.ArrowInvalid: it cannot be read; ValueError: its row group
    would unpack to an absurd size."""
    with _reading_cells:
        starts = _group_starts(cell.file)
        if cell.row >= starts[-1]:
            raise IndexError(f"{cell.file} has {starts[-1]} rows")
        group = bisect_right(starts, cell.row) - 1
        value: Any = row_group(cell.file, group, cell.column)[cell.row - starts[group]].as_py()
    path = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if value is None:
        return str(path) if path else None
    return bytes(value)  # a list of numbers too


_reading_cells = threading.Lock()


@lru_cache(maxsize=1)
def _group_starts(uri: str) -> list[int]:
    with open_file(uri) as opened:
        metadata = pq.read_metadata(opened)
    return list(accumulate((metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)), initial=0))


@lru_cache(MAX_OPEN_GROUPS)  # the images of a part are neighbours
def row_group(uri: str, group: int, column: str) -> pa.ChunkedArray:
    with open_file(uri) as opened:
        file = open_column(opened, column)
        check_expansion(file.metadata.row_group(group), column)
        return file.read_row_group(group, columns=[column])[column]
