"""Containers of images: tar shards in WebDataset's layout, and Parquet files with a column of image files.

The URI of an image in a container says where it lies: ``shard.tar#<offset>+<bytes>/<name in the tar>`` or
``table.parquet#<row>/<column>``. So each image can be read alone: from a tar with one ranged request, from Parquet
with its row group.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from icce_ray.config import ImagesConfig
from icce_ray.errors import InputError
from icce_ray.images.image_files import IMAGE_ENDINGS, PARQUET_ENDINGS, File
from icce_ray.images.listing import Entry
from icce_ray.images.parquet_columns import image_column
from icce_ray.images.uris import local_path_or_uri
from icce_ray.store.filesystem import open_uri

TAR_MEMBER = re.compile(r"^(?P<file>.*\.tar)#(?P<offset>\d+)\+(?P<size>\d+)/(?P<name>.*)$", re.DOTALL | re.IGNORECASE)
PARQUET_MEMBER = re.compile(r"^(?P<file>.*\.(?:parquet|pq))#(?P<row>\d+)/(?P<column>.*)$", re.DOTALL | re.IGNORECASE)
TAR_BUFFER_BYTES = 4 * 2**20
"""Tar headers are read through a buffer: seeks within it need no request."""
MAX_OPEN_GROUPS = 2
LABEL_ENDING = ".cls"


class Span(NamedTuple):
    """The bytes of a tar member."""

    file: str
    start: int
    num_bytes: int


class Cell(NamedTuple):
    """A cell of a Parquet file."""

    file: str
    row: int
    column: str


def locate(uri: str) -> Span | Cell | None:
    """The place of the image `uri` in its container, or None if it is a file of its own."""
    if found := TAR_MEMBER.match(uri):
        return Span(found["file"], int(found["offset"]), int(found["size"]))
    if found := PARQUET_MEMBER.match(uri):
        return Cell(found["file"], int(found["row"]), found["column"])
    return None


def file_of(uri: str) -> str:
    """The file that holds the image `uri`: a container, or the image file itself."""
    place = locate(uri)
    return uri if place is None else place.file


def members(container: File, images: ImagesConfig) -> Iterator[Entry]:
    """The images in a container, in its order. Only headers are read.

    Raises:
        InputError: the container cannot be read.
    """
    uri = container.uri
    if uri.lower().endswith(PARQUET_ENDINGS):
        with _open(uri) as opened:
            file = pq.ParquetFile(opened)
            column = image_column(file.schema_arrow, images, uri)
            for row in range(file.metadata.num_rows):
                yield Entry(f"{uri}#{row}/{column}", None, container.etag)
        return
    for member, _ in _walk_tar(uri, _is_image, read=False):
        place = f"{uri}#{member.offset_data}+{member.size}/{member.name.removeprefix('./')}"
        yield Entry(place, member.size, container.etag)


def labels_beside(uris: Sequence[str]) -> list[str | None]:
    """The label of each image of a tar shard: the text of the ``.cls`` file with the same key (the name up to its first
    dot), or None if there is none. Each shard is read once."""
    keys_by_tar: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, uri in enumerate(uris):
        if match := TAR_MEMBER.match(uri):
            keys_by_tar[match["file"]][_key(match["name"])].append(number)
    labels: list[str | None] = [None] * len(uris)
    for file, numbers_by_key in keys_by_tar.items():
        for member, data in _walk_tar(file, lambda name: name.suffix.lower() == LABEL_ENDING):
            for number in numbers_by_key.get(_key(member.name), ()):
                labels[number] = data.decode("utf-8", "replace").strip()
    return labels


def _key(name: str) -> str:
    folder, _, base = name.removeprefix("./").rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _is_image(name: PurePosixPath) -> bool:
    return name.suffix.lower() in IMAGE_ENDINGS and not name.name.startswith(".")


def _walk_tar(
    uri: str, wanted: Callable[[PurePosixPath], bool], *, read: bool = True
) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The wanted files of a tar, in order, with their bytes if `read`."""
    try:
        with (
            _open(uri) as file,
            io.BufferedReader(file, TAR_BUFFER_BYTES) as buffered,
            tarfile.open(fileobj=buffered, mode="r:") as tar,
        ):
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps every header
                if member.isfile() and wanted(PurePosixPath(member.name)):
                    opened = tar.extractfile(member) if read else None
                    yield member, b"" if opened is None else opened.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"images.uri: the tar {uri} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _open(file: str) -> Any:
    filesystem, path = open_uri(local_path_or_uri(file))
    return filesystem.open_input_file(path)


class ParquetCells:
    """Reads cells. Keeps the last row groups, since the images of a part are neighbours. Not thread-safe."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, int, str], pa.ChunkedArray] = OrderedDict()
        self._starts: dict[str, list[int]] = {}

    def read(self, cell: Cell) -> bytes | None:
        """The cell's bytes, or None if it is null.

        Raises:
            IndexError: the file has fewer rows.
            OSError, pa.ArrowInvalid: it cannot be read.
        """
        starts = self._starts.get(cell.file)
        if starts is None:
            with _open(cell.file) as opened:
                metadata = pq.ParquetFile(opened).metadata
            starts = [0]
            for group in range(metadata.num_row_groups):
                starts.append(starts[-1] + metadata.row_group(group).num_rows)
            self._starts = {cell.file: starts}
        if cell.row >= starts[-1]:
            raise IndexError(f"{cell.file} has {starts[-1]} rows")
        group = max(index for index, start in enumerate(starts[:-1]) if start <= cell.row)
        value: Any = self._group(cell, group)[cell.row - starts[group]].as_py()
        data: bytes | None = value.get("bytes") if isinstance(value, dict) else value
        return data

    def _group(self, cell: Cell, group: int) -> pa.ChunkedArray:
        key = (cell.file, group, cell.column)
        if key not in self._groups:
            with _open(cell.file) as opened:
                self._groups[key] = pq.ParquetFile(opened).read_row_group(group, columns=[cell.column])[cell.column]
            while len(self._groups) > MAX_OPEN_GROUPS:
                self._groups.popitem(last=False)
        return self._groups[key]
