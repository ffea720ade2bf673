"""Columns of Parquet files that others wrote: which is meant, and what it holds."""

import difflib
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from icce_ray.config import ImagesConfig
from icce_ray.errors import InputError

PARQUET_ENDINGS = (".parquet", ".pq")
MAX_EXPANSION = 100
MAX_TEXT_BYTES = 4096
"""The longest URI or label that is read."""
MIN_BOMB_BYTES = 2**28
"""A row group that unpacks to more bytes than this, and to more than MAX_EXPANSION times its own, is not read."""


def find_field(schema: pa.Schema, column: str, uri: str, setting: str) -> pa.Field:
    """The field `column` of the file `uri`, as the config's `setting` names it. Raises InputError: there is no such
    column; says which there are, and which may have been meant."""
    if (count := schema.names.count(column)) == 1:
        return schema.field(column)
    if count > 1:
        raise InputError(f"{setting}: {uri} has {count} columns {column!r}; rename or remove all but one")
    close = difflib.get_close_matches(column, schema.names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"{setting}: {uri} has no column {column!r}; it has {', '.join(schema.names) or 'none'}{hint}")


def is_string(kind: pa.DataType) -> bool:
    """Whether the values of a column are text, dictionary-encoded or not."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def image_column(schema: pa.Schema, images: ImagesConfig, uri: str) -> str | None:
    """The column that holds image files, or None if the file is a list of URIs. Raises InputError:
    `images.bytes_column` is missing or of another type, or the file has neither URIs nor image files."""
    if images.bytes_column is not None:
        field = find_field(schema, images.bytes_column, uri, "images.bytes_column")
        if not _holds_bytes(field.type, is_named=True):
            raise InputError(f"images.bytes_column: {field.name!r} in {uri} is {field.type}, not binary")
        return images.bytes_column
    if images.uri_column in schema.names:
        return None
    found: list[str] = [field.name for field in schema if _holds_bytes(field.type)]
    if len(set(found)) < len(found):
        find_field(schema, max(found, key=found.count), uri, "images.uri")
    if len(found) > 1:
        raise InputError(f"images.uri: {uri} has the binary columns {', '.join(found)}: name images.bytes_column")
    if found:
        return found[0]
    if lists := [f"{field.name!r} is {field.type}" for field in schema if pa.types.is_nested(field.type)]:
        raise InputError(
            f"images.uri: {uri} has neither a column {images.uri_column!r} nor one of type binary; "
            f"{', '.join(lists)}. Name images.bytes_column if one of them holds the bytes of an image file as uint8"
        )
    find_field(schema, images.uri_column, uri, "images.uri_column")  # says that there is none
    return None


def _holds_bytes(kind: pa.DataType, *, is_named: bool = False) -> bool:
    """Whether a column holds files. Lists of uint8 may hold anything, so only if the config names the column."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type, is_named=True))
    if is_named and (lists := _list_type(kind)) is not None:
        return bool(pa.types.is_uint8(lists.value_type))
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def list_column(schema: pa.Schema, uri: str) -> str:
    """The only column of lists. Raises InputError: there is none, or several."""
    lists = [field.name for field in schema if _list_type(field.type) is not None]
    if len(set(lists)) == 1:
        return str(find_field(schema, lists[0], uri, "embeddings.uri").name)
    if not lists:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise InputError(f"embeddings.uri: {uri} has no list column; it has {columns}")
    raise InputError(f"embeddings.uri: {uri} has the list columns {', '.join(lists)}: name one with embeddings.column")


def list_dtype(schema: pa.Schema, column: str, uri: str) -> np.dtype[Any]:
    """The type of the values in a column of lists. Raises InputError: it is no such column."""
    field = find_field(schema, column, uri, "embeddings.column")
    if (lists := _list_type(field.type)) is not None:
        with suppress(NotImplementedError):
            dtype: np.dtype[Any] = np.dtype(lists.value_type.to_pandas_dtype())
            return dtype
    raise InputError(f"embeddings.column: {column!r} in {uri} is {field.type}, not a list of floats")


def _list_type(kind: pa.DataType) -> pa.DataType | None:
    """The type of a column of lists, also of an extension type that is stored as one (a tensor); None for others."""
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return kind if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind) else None


def check_expansion(group: Any, column: str) -> None:
    """Refuse a row group (its metadata) whose column would unpack to an absurd size. Raises ValueError: the sizes."""
    chunks = [group.column(index) for index in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] == column.partition(".")[0]]
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
    packed = sum(chunk.total_compressed_size for chunk in chunks)
    if unpacked > max(MIN_BOMB_BYTES, MAX_EXPANSION * packed):
        raise ValueError(f"decompression bomb: {packed} bytes would become {unpacked}")


def check_column(file: pq.ParquetFile, column: str) -> None:
    """:func:`check_expansion` of all row groups."""
    for group in range(file.metadata.num_row_groups):
        check_expansion(file.metadata.row_group(group), column)


def open_column(opened: Any, *columns: str) -> pq.ParquetFile:
    """A Parquet file in which equal values of `columns` are one in memory, if they are of text or bytes: a file of a
    megabyte could name one value a million times."""
    metadata = pq.read_metadata(opened)
    leaves = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    names = (*columns, *(f"{column}.bytes" for column in columns))
    shared = [leaf.path for leaf in leaves if leaf.path in names and leaf.physical_type == "BYTE_ARRAY"]
    return pq.ParquetFile(opened, metadata=metadata, read_dictionary=shared)


def read_text(file: pq.ParquetFile, column: str) -> pa.ChunkedArray:
    """A text column of :func:`open_column`. Raises as :func:`to_strings`."""
    return to_strings(file.read(columns=[column])[column], column)


def to_strings(shared: pa.ChunkedArray, column: str) -> pa.ChunkedArray:
    """Values of a text column of :func:`open_column`. Raises ArrowInvalid: not UTF-8; ValueError: a text over
    MAX_TEXT_BYTES."""
    for chunk in shared.chunks if pa.types.is_dictionary(shared.type) else ():
        longest = pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0
        if longest > MAX_TEXT_BYTES:
            raise ValueError(
                f"column {column!r} holds a text of {longest:,} bytes; at most {MAX_TEXT_BYTES:,} are read"
            )
    text = shared.cast(pa.string())
    text.validate(full=True)
    return text
