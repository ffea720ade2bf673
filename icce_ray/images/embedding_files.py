"""Ready-made embeddings as input: a .npy file, or Parquet with a list column, read a block of rows at a time."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.config import EmbeddingsConfig
from icce_ray.errors import InputError
from icce_ray.images.parquet_columns import (
    PARQUET_ENDINGS,
    check_column,
    is_string,
    list_column,
    list_dtype,
    open_column,
    read_text,
)
from icce_ray.store.filesystem import open_uri

READ_BATCH_ROWS = 8192
NULL, NOT_FINITE = -1, -2
"""These stand for the number of values of a row that cannot be used."""


class Block(NamedTuple):
    """Some rows in order. Those that cannot be used are there, too, and hold NaN."""

    rows_nD: npt.NDArray[Any]
    num_values_n: npt.NDArray[np.int64]
    """(n,) D for each row that can be used; otherwise its number of values, NULL or NOT_FINITE."""

    @property
    def is_usable_n(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.num_values_n == self.rows_nD.shape[1])

    def part(self, start: int, stop: int | None = None) -> "Block":
        return Block(self.rows_nD[start:stop], self.num_values_n[start:stop])

    def problems(self) -> dict[int, str]:
        """Why a row cannot be used, by its number in the block."""
        dim, dtype = self.rows_nD.shape[1], self.rows_nD.dtype
        texts = {NULL: "null: the row has no embedding", NOT_FINITE: f"NaN, null or infinite values, as {dtype}"}
        return {
            row: texts.get(number, f"{number:,} values; the others have {dim:,}")
            for row, number in enumerate(self.num_values_n.tolist())
            if number != dim
        }


@dataclass(frozen=True)
class EmbeddingFile:
    """A file of embeddings, and what tells whether it changed."""

    filesystem: pafs.FileSystem
    path: str
    uri: str
    """An absolute path, or the URI on remote storage."""
    size_bytes: int
    mtime_ns: int | None


def read_npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array in an opened .npy file, whose rows follow. Raises ValueError: it is none, or cut off,
    or stored column by column, or holds objects."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if file.size() < file.tell() + math.prod(shape) * dtype.itemsize:
        raise ValueError("it is cut off")
    if fortran_order and len(shape) > 1:
        raise ValueError("it is stored column by column; save np.ascontiguousarray of it")
    return shape, dtype


class NpyEmbeddings:
    """An (N, D) floating-point array. On remote storage it is read by byte ranges, never as a whole. Its `dtype` is
    float16 or float32."""

    def __init__(self, file: EmbeddingFile) -> None:
        self.files = [file]
        self._array: npt.NDArray[Any] | None = None
        try:
            if isinstance(file.filesystem, pafs.LocalFileSystem):
                self._array = np.load(file.path, mmap_mode="r", allow_pickle=False)
                shape, self._stored = self._array.shape, self._array.dtype
            else:
                with file.filesystem.open_input_file(file.path) as opened:
                    shape, self._stored = read_npy_header(opened)
                    self._offset = opened.tell()
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"embeddings.uri: {file.uri} cannot be read as a .npy array: {error}") from None
        if len(shape) != 2 or 0 in shape:
            raise InputError(f"embeddings.uri: {file.uri} has shape {shape}; needed is (images, dimensions), neither 0")
        self.dtype = _kept_dtype(self._stored, file.uri)
        self.num_rows, self.dim = int(shape[0]), int(shape[1])

    def uris(self, uri_column: str, start: int = 0, stop: int | None = None) -> pa.ChunkedArray:
        """(n,) string, the URIs of the rows from `start` to `stop` (None: to the end): the file's own column
        `uri_column` if it has one, else ``<file>#<row of that file>``."""
        return pa.chunked_array([_row_uris(self.files[0].uri, start, self.num_rows if stop is None else stop)])

    def blocks(self, num_rows: int, start: int = 0) -> Iterator[Block]:
        """Rows from `start` on, in order, in blocks (num_rows, D) of `dtype`; the last one may be shorter."""
        for first in range(start, self.num_rows, num_rows):
            stop = min(first + num_rows, self.num_rows)
            rows_nD = self._read_rows(first, stop) if self._array is None else self._array[first:stop]
            yield _checked(rows_nD, np.full(stop - first, self.dim), self.dtype)

    def _read_rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        row_bytes = self.dim * self._stored.itemsize
        with self.files[0].filesystem.open_input_file(self.files[0].path) as file:
            data = file.read_at((stop - start) * row_bytes, self._offset + start * row_bytes)
        return np.frombuffer(data, dtype=self._stored).reshape(stop - start, self.dim)


class ParquetEmbeddings:
    """The same from a list column of floats; the files of a folder in the order of their names. `dim` is by default the
    length of most of the first lists."""

    def __init__(self, files: list[EmbeddingFile], column: str | None, dim: int | None = None) -> None:
        self.files = files
        self._schemas, self._rows = list[pa.Schema](), list[int]()
        for file in files:
            with _opened_parquet(file) as parquet:
                self._schemas.append(parquet.schema_arrow)
                self._rows.append(parquet.metadata.num_rows)
        self.column = column or list_column(self._schemas[0], files[0].uri)
        stored = {list_dtype(schema, self.column, file.uri) for file, schema in zip(files, self._schemas, strict=True)}
        if len(stored) > 1:
            raise InputError(f"embeddings.uri: column {self.column!r} has different types in the files of the folder")
        self.dtype = _kept_dtype(stored.pop(), files[0].uri)
        self.num_rows = sum(self._rows)
        if self.num_rows == 0:
            raise InputError(f"embeddings.uri: {files[0].uri} holds no rows")
        self.dim = dim or self._usual_length()

    def uris(self, uri_column: str, start: int = 0, stop: int | None = None) -> pa.ChunkedArray:
        chunks, offset = list[pa.Array](), 0
        for file, schema, rows in zip(self.files, self._schemas, self._rows, strict=True):
            first, last = max(start - offset, 0), rows if stop is None else min(stop - offset, rows)
            offset += rows
            if first < last:
                chunks.append(_row_uris(file.uri, first, last))
                if uri_column in schema.names and is_string(schema.field(uri_column).type):
                    with _opened_parquet(file, uri_column) as parquet:
                        own = read_text(parquet, uri_column)
                    chunks[-1] = pc.coalesce(own.slice(first, last - first).combine_chunks(), chunks[-1])
        return pa.chunked_array(chunks, type=pa.string())

    def blocks(self, num_rows: int, start: int = 0) -> Iterator[Block]:
        pending, held = list[Block](), 0
        for block in self._read(start):
            pending.append(block)
            held += len(block.rows_nD)
            if held >= num_rows:
                joined = Block(*map(np.concatenate, zip(*pending, strict=True)))
                whole = held - held % num_rows
                yield from (joined.part(first, first + num_rows) for first in range(0, whole, num_rows))
                pending, held = [joined.part(whole)], held - whole
        if held:
            yield Block(*map(np.concatenate, zip(*pending, strict=True)))

    def _read(self, skip: int) -> Iterator[Block]:
        """Small batches of rows behind the first `skip`, whose row groups are not read."""
        for file, rows in zip(self.files, self._rows, strict=True):
            if skip >= rows:
                skip -= rows
                continue
            with _opened_parquet(file, self.column) as parquet:
                first, groups = 0, list(range(parquet.num_row_groups))
                while skip - first >= parquet.metadata.row_group(groups[0]).num_rows:
                    first += parquet.metadata.row_group(groups.pop(0)).num_rows
                for batch in parquet.iter_batches(READ_BATCH_ROWS, row_groups=groups, columns=[self.column]):
                    if first + len(batch) > skip:
                        yield self._to_block(batch.column(0)).part(max(skip - first, 0))
                    first += len(batch)
            skip = 0

    def _to_block(self, lists: pa.Array) -> Block:
        lists = _storage_array(lists)
        num_values_n = _lengths(lists)
        has_all = num_values_n == self.dim
        whole = lists if has_all.all() else lists.filter(pa.array(has_all))
        # Nulls inside the lists become NaN.
        rows_nD = whole.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dim)
        if whole is not lists:
            whole_nD, rows_nD = rows_nD, np.full((len(lists), self.dim), np.nan, rows_nD.dtype)
            rows_nD[has_all] = whole_nD
        return _checked(rows_nD, num_values_n, self.dtype)

    def _usual_length(self) -> int:
        file = next(file for file, rows in zip(self.files, self._rows, strict=True) if rows)
        with _opened_parquet(file, self.column) as parquet:
            batch = next(parquet.iter_batches(READ_BATCH_ROWS, columns=[self.column]))
        lengths = [length for length in _lengths(_storage_array(batch.column(0))).tolist() if length > 0]
        if not lengths:
            raise InputError(f"embeddings.uri: {file.uri}, column {self.column!r}: the first rows are empty")
        return int(Counter(lengths).most_common(1)[0][0])


Embeddings = NpyEmbeddings | ParquetEmbeddings
"""N embeddings of D dimensions in a fixed order."""


def open_embeddings(config: EmbeddingsConfig) -> Embeddings:
    """Open `config.uri`; only headers are read. Usage: ``open_embeddings(config.embeddings).blocks(65536)``. Raises
    InputError: nothing there, another format, the wrong number of axes, not floating point, no such column."""
    assert config.uri is not None
    filesystem, path = open_uri(config.uri)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"embeddings.uri: {config.uri} does not exist")
    if info.type == pafs.FileType.Directory:
        if not (files := _parquet_files(filesystem, path, config.uri)):
            raise InputError(f"embeddings.uri: no .parquet file in the folder {config.uri}")
        return ParquetEmbeddings(files, config.column)
    if info.type != pafs.FileType.File:
        raise InputError(f"embeddings.uri: {config.uri} is neither a file nor a folder")
    file = _embedding_file(filesystem, info, config.uri)
    if path.lower().endswith(".npy"):
        return NpyEmbeddings(file)
    if path.lower().endswith(PARQUET_ENDINGS):
        return ParquetEmbeddings([file], config.column)
    raise InputError(f"embeddings.uri: {config.uri} is not a .npy or .parquet file, nor a folder of .parquet files")


def open_embedding_sets(config: EmbeddingsConfig) -> list[Embeddings]:
    """Open `config.uri` and all of `config.extra`. Raises InputError: as :func:`open_embeddings`, or the numbers of
    rows differ."""
    places = (config.uri, *config.extra)
    sets = [open_embeddings(config.model_copy(update={"uri": place})) for place in places]
    for place, found in zip(places, sets, strict=True):
        if found.num_rows != sets[0].num_rows:
            raise InputError(
                f"embeddings.extra: {place} has {found.num_rows:,} rows, {config.uri} has {sets[0].num_rows:,}; "
                "all must have the same images in the same order"
            )
    return sets


def _lengths(lists: pa.Array) -> npt.NDArray[np.int64]:
    """(n,) number of values of each list; NULL where there is none."""
    return np.asarray(pc.list_value_length(lists).fill_null(NULL).to_numpy(zero_copy_only=False), np.int64)


@contextmanager
def _opened_parquet(file: EmbeddingFile, *columns: str) -> Iterator[pq.ParquetFile]:
    """A file to read `columns` from. Raises InputError: the file is damaged, or unpacks to an absurd size."""
    try:
        with file.filesystem.open_input_file(file.path) as opened:
            parquet = open_column(opened, *columns)
            for column in columns:
                check_column(parquet, column)
            yield parquet
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"embeddings.uri: {file.uri} cannot be read as Parquet: {error}") from None


def _embedding_file(filesystem: pafs.FileSystem, info: pafs.FileInfo, uri: str) -> EmbeddingFile:
    name = info.path if isinstance(filesystem, pafs.LocalFileSystem) else uri
    return EmbeddingFile(filesystem, info.path, name, info.size, info.mtime_ns)


def _parquet_files(filesystem: pafs.FileSystem, path: str, uri: str) -> list[EmbeddingFile]:
    found = []
    for info in filesystem.get_file_info(pafs.FileSelector(path, recursive=True)):
        below = info.path[len(path) :].strip("/")
        hidden = any(step.startswith((".", "_")) for step in below.split("/"))
        if info.type == pafs.FileType.File and not hidden and below.lower().endswith(PARQUET_ENDINGS):
            found.append(_embedding_file(filesystem, info, f"{uri.rstrip('/')}/{below}"))
    return sorted(found, key=lambda file: file.uri)


def _storage_array(lists: pa.Array) -> pa.Array:
    return lists.storage if isinstance(lists, pa.ExtensionArray) else lists


def _kept_dtype(stored: np.dtype[Any], uri: str) -> np.dtype[Any]:
    if stored.kind != "f":
        raise InputError(f"embeddings.uri: {uri} holds {stored}; needed is floating point, such as float16 or float32")
    return np.dtype(np.float16 if stored.itemsize == 2 else np.float32)


def _row_uris(uri: str, start: int, stop: int) -> pa.Array:
    rows = pa.array(np.arange(start, stop)).cast(pa.string())
    return pc.binary_join_element_wise(pa.scalar(uri), rows, "#")


def _checked(rows_nD: npt.NDArray[Any], num_values_n: npt.NDArray[np.int64], dtype: np.dtype[Any]) -> Block:
    with np.errstate(over="ignore"):
        kept = np.ascontiguousarray(rows_nD, dtype=dtype)
    # np.isfinite makes a detour through float32 for float16, which takes several times as long.
    is_finite_nD = (kept.view(np.uint16) & 0x7C00) != 0x7C00 if dtype == np.float16 else np.isfinite(kept)
    is_kept_n = is_finite_nD.all(axis=1) | (num_values_n != kept.shape[1])
    return Block(kept, np.where(is_kept_n, num_values_n, NOT_FINITE))
