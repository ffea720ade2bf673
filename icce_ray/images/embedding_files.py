"""Ready-made embeddings as input: a .npy file, or Parquet with a list column, read a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.config import EmbeddingsConfig
from icce_ray.errors import InputError
from icce_ray.images.parquet_columns import check_column, find_field, is_string, open_column, read_text
from icce_ray.store.filesystem import open_uri

READ_BATCH_ROWS = 8192


@dataclass(frozen=True)
class EmbeddingFile:
    """A file of embeddings, and what tells whether it changed."""

    filesystem: pafs.FileSystem
    path: str
    uri: str
    """An absolute path, or the URI on remote storage."""
    size_bytes: int
    mtime_ns: int | None


class Embeddings(Protocol):
    """N embeddings of D dimensions in a fixed order."""

    files: list[EmbeddingFile]
    num_rows: int
    dim: int
    dtype: np.dtype[Any]
    """float16 or float32."""

    def uris(self, uri_column: str, start: int = 0, stop: int | None = None) -> pa.ChunkedArray:
        """(n,) string, the URIs of the rows from `start` to `stop` (None: to the end): the file's own column
        `uri_column` if it has one, else ``<file>#<row of that file>``."""

    def blocks(self, num_rows: int, start: int = 0) -> Iterator[npt.NDArray[Any]]:
        """Rows from `start` on, in order, in blocks (num_rows, D) of `dtype`; the last one may be shorter. Raises
        InputError: a list of another length, a null, or a value that is not finite."""


def open_embeddings(config: EmbeddingsConfig) -> Embeddings:
    """Open `config.uri`; only headers are read. Usage: ``open_embeddings(config.embeddings).blocks(65536)``. Raises
    InputError: nothing there, another format, the wrong number of axes, not floating point, no such column."""
    assert config.uri is not None
    filesystem, path = open_uri(config.uri)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"embeddings.uri: {config.uri} does not exist")
    if info.type == pafs.FileType.Directory:
        files = _parquet_files(filesystem, path, config.uri)
        if not files:
            raise InputError(f"embeddings.uri: no .parquet file in the folder {config.uri}")
        return ParquetEmbeddings(files, config.column)
    if info.type != pafs.FileType.File:
        raise InputError(f"embeddings.uri: {config.uri} is neither a file nor a folder")
    file = _embedding_file(filesystem, info, config.uri)
    if path.lower().endswith(".npy"):
        return NpyEmbeddings(file)
    if path.lower().endswith((".parquet", ".pq")):
        return ParquetEmbeddings([file], config.column)
    raise InputError(f"embeddings.uri: {config.uri} is not a .npy or .parquet file, nor a folder of .parquet files")


def open_embedding_sets(config: EmbeddingsConfig) -> list[Embeddings]:
    """Open `config.uri` and all of `config.extra`, as :func:`open_embeddings`. Raises InputError: as there, or the
    numbers of rows differ."""
    places = (config.uri, *config.extra)
    sets = [open_embeddings(config.model_copy(update={"uri": place})) for place in places]
    for place, found in zip(places, sets, strict=True):
        if found.num_rows != sets[0].num_rows:
            raise InputError(
                f"embeddings.extra: {place} has {found.num_rows:,} rows, {config.uri} has {sets[0].num_rows:,}; "
                "all must have the same images in the same order"
            )
    return sets


class NpyEmbeddings:
    """An (N, D) floating-point array. On remote storage it is read by byte ranges, never as a whole."""

    def __init__(self, file: EmbeddingFile) -> None:
        self.files = [file]
        self._array: npt.NDArray[Any] | None = None
        try:
            if isinstance(file.filesystem, pafs.LocalFileSystem):
                self._array = np.load(file.path, mmap_mode="r", allow_pickle=False)
                shape, self._stored = self._array.shape, self._array.dtype
            else:
                shape, self._stored = self._read_header()
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"embeddings.uri: {file.uri} cannot be read as a .npy array: {error}") from None
        if len(shape) != 2 or 0 in shape:
            raise InputError(f"embeddings.uri: {file.uri} has shape {shape}; needed is (images, dimensions), neither 0")
        self.dtype = _kept_dtype(self._stored, file.uri)
        self.num_rows, self.dim = int(shape[0]), int(shape[1])

    def uris(self, uri_column: str, start: int = 0, stop: int | None = None) -> pa.ChunkedArray:
        return pa.chunked_array([_row_uris(self.files[0].uri, start, self.num_rows if stop is None else stop)])

    def blocks(self, num_rows: int, start: int = 0) -> Iterator[npt.NDArray[Any]]:
        for first in range(start, self.num_rows, num_rows):
            stop = min(first + num_rows, self.num_rows)
            block = self._array[first:stop] if self._array is not None else self._read_rows(first, stop)
            yield _checked(block, self.dtype, first, self.files[0].uri)

    def _read_header(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        with self.files[0].filesystem.open_input_file(self.files[0].path) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(file)
            self._offset = file.tell()
            if file.size() < self._offset + math.prod(shape) * dtype.itemsize:
                raise ValueError("it is cut off")
        if fortran_order:
            raise ValueError("it is stored column by column; save np.ascontiguousarray of it")
        return shape, dtype

    def _read_rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        row_bytes = self.dim * self._stored.itemsize
        with self.files[0].filesystem.open_input_file(self.files[0].path) as file:
            file.seek(self._offset + start * row_bytes)
            data = file.read((stop - start) * row_bytes)
        return np.frombuffer(data, dtype=self._stored).reshape(stop - start, self.dim)


class ParquetEmbeddings:
    """A list column of floats, all lists of the same length; the files of a folder in the order of their names."""

    def __init__(self, files: list[EmbeddingFile], column: str | None) -> None:
        self.files = files
        self._schemas: list[pa.Schema] = []
        self._rows: list[int] = []
        for file in files:
            with _opened_parquet(file) as parquet:
                self._schemas.append(parquet.schema_arrow)
                self._rows.append(parquet.metadata.num_rows)
        self.column = column or _only_list_column(self._schemas[0], files[0].uri)
        stored = {
            _value_dtype(schema, self.column, file.uri) for file, schema in zip(files, self._schemas, strict=True)
        }
        if len(stored) > 1:
            raise InputError(f"embeddings.uri: column {self.column!r} has different types in the files of the folder")
        self.dtype = _kept_dtype(stored.pop(), files[0].uri)
        self.num_rows = sum(self._rows)
        if self.num_rows == 0:
            raise InputError(f"embeddings.uri: {files[0].uri} holds no rows")
        self.dim = self._first_length()

    def uris(self, uri_column: str, start: int = 0, stop: int | None = None) -> pa.ChunkedArray:
        chunks: list[pa.Array] = []
        offset = 0
        for file, schema, rows in zip(self.files, self._schemas, self._rows, strict=True):
            first = max(start - offset, 0)
            last = rows if stop is None else min(stop - offset, rows)
            offset += rows
            if first >= last:
                continue
            uris = _row_uris(file.uri, first, last)
            if uri_column in schema.names and is_string(schema.field(uri_column).type):
                with _opened_parquet(file, uri_column) as parquet:
                    own = read_text(parquet, uri_column)
                uris = pc.coalesce(own.slice(first, last - first).combine_chunks(), uris)
            chunks.append(uris)
        return pa.chunked_array(chunks, type=pa.string())

    def blocks(self, num_rows: int, start: int = 0) -> Iterator[npt.NDArray[Any]]:
        pending: list[npt.NDArray[Any]] = []
        held = 0
        for rows in self._read(start):
            pending.append(rows)
            held += len(rows)
            if held >= num_rows:
                joined = np.concatenate(pending)
                whole = held - held % num_rows
                yield from (joined[first : first + num_rows] for first in range(0, whole, num_rows))
                pending, held = [joined[whole:]], held - whole
        if held:
            yield np.concatenate(pending)

    def _read(self, start: int) -> Iterator[npt.NDArray[Any]]:
        """Small batches of rows from `start` on; row groups before it are not read."""
        skip = start
        for file, rows in zip(self.files, self._rows, strict=True):
            if skip >= rows:
                skip -= rows
                continue
            with _opened_parquet(file, self.column) as parquet:
                first, groups = 0, list(range(parquet.num_row_groups))
                while skip - first >= parquet.metadata.row_group(groups[0]).num_rows:
                    first += parquet.metadata.row_group(groups.pop(0)).num_rows
                for batch in parquet.iter_batches(READ_BATCH_ROWS, row_groups=groups, columns=[self.column]):
                    rows_nD = self._to_array(batch.column(0), first, file.uri)
                    if first + len(rows_nD) > skip:
                        yield rows_nD[max(skip - first, 0) :]
                    first += len(rows_nD)
            skip = 0

    def _to_array(self, lists: pa.Array, first: int, uri: str) -> npt.NDArray[Any]:
        lists = _storage_array(lists)
        lengths = pc.list_value_length(lists).fill_null(-1).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != self.dim)
        if len(wrong):
            row, length = first + int(wrong[0]), int(lengths[wrong[0]])
            found = "null" if length < 0 else f"a list of {length} values"
            raise InputError(
                f"embeddings.uri: {uri}, column {self.column!r}, row {row} holds {found}; the first row has {self.dim}"
            )
        values = lists.flatten()
        if values.null_count:
            raise InputError(f"embeddings.uri: {uri}, column {self.column!r}: nulls inside the lists after row {first}")
        return _checked(values.to_numpy(zero_copy_only=False).reshape(len(lists), self.dim), self.dtype, first, uri)

    def _first_length(self) -> int:
        file = next(file for file, rows in zip(self.files, self._rows, strict=True) if rows)
        with _opened_parquet(file, self.column) as parquet:
            batch = next(parquet.iter_batches(1, columns=[self.column]))
        length = pc.list_value_length(_storage_array(batch.column(0)))[0].as_py()
        if not length:
            raise InputError(f"embeddings.uri: {file.uri}, column {self.column!r}: the first row is empty")
        return int(length)


@contextmanager
def _opened_parquet(file: EmbeddingFile, column: str | None = None) -> Iterator[pq.ParquetFile]:
    """A file to read `column` from. Raises InputError: the file is damaged, or unpacks to an absurd size."""
    try:
        with file.filesystem.open_input_file(file.path) as opened:
            if column is None:
                yield pq.ParquetFile(opened)
            else:
                parquet = open_column(opened, column)
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
        if info.type == pafs.FileType.File and not hidden and below.lower().endswith((".parquet", ".pq")):
            found.append(_embedding_file(filesystem, info, f"{uri.rstrip('/')}/{below}"))
    return sorted(found, key=lambda file: file.uri)


def _only_list_column(schema: pa.Schema, uri: str) -> str:
    lists = [field.name for field in schema if _is_list(_storage_type(field.type))]
    if len(set(lists)) == 1:
        return str(find_field(schema, lists[0], uri, "embeddings.uri").name)
    if not lists:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise InputError(f"embeddings.uri: {uri} has no list column; it has {columns}")
    raise InputError(f"embeddings.uri: {uri} has the list columns {', '.join(lists)}: name one with embeddings.column")


def _value_dtype(schema: pa.Schema, column: str, uri: str) -> np.dtype[Any]:
    field = find_field(schema, column, uri, "embeddings.column")
    lists = _storage_type(field.type)
    try:
        if _is_list(lists):
            dtype: np.dtype[Any] = np.dtype(lists.value_type.to_pandas_dtype())
            return dtype
    except NotImplementedError:
        pass
    raise InputError(f"embeddings.column: {column!r} in {uri} is {field.type}, not a list of floats")


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _storage_type(kind: pa.DataType) -> pa.DataType:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _storage_array(lists: pa.Array) -> pa.Array:
    return lists.storage if isinstance(lists, pa.ExtensionArray) else lists


def _kept_dtype(stored: np.dtype[Any], uri: str) -> np.dtype[Any]:
    if stored.kind != "f":
        raise InputError(f"embeddings.uri: {uri} holds {stored}; needed is floating point, such as float16 or float32")
    return np.dtype(np.float16 if stored.itemsize == 2 else np.float32)


def _row_uris(uri: str, start: int, stop: int) -> pa.Array:
    rows = pa.array(np.arange(start, stop)).cast(pa.string())
    return pc.binary_join_element_wise(pa.scalar(uri), rows, "#")


def _checked(rows_nD: npt.NDArray[Any], dtype: np.dtype[Any], first: int, uri: str) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        kept = np.ascontiguousarray(rows_nD, dtype=dtype)
    wrong = np.flatnonzero(~_is_finite(kept).all(axis=1))
    if len(wrong):
        more = f" and {len(wrong) - 3} more there" if len(wrong) > 3 else ""
        rows = ", ".join(str(first + row) for row in wrong[:3])
        raise InputError(
            f"embeddings.uri: {uri}, row {rows}{more}: NaN or infinite as {dtype}. "
            "Leave these rows out, or fix the program that wrote them"
        )
    return kept


def _is_finite(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """np.isfinite, without its detour through float32 for float16, which takes several times as long."""
    if values.dtype != np.float16:
        return np.asarray(np.isfinite(values))
    return np.asarray((values.view(np.uint16) & 0x7C00) != 0x7C00)
