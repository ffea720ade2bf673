"""Columns of Parquet files that others wrote: which is meant, and what it holds."""

from __future__ import annotations

import difflib

import pyarrow as pa

from icce_ray.config import ImagesConfig
from icce_ray.errors import InputError


def find_field(schema: pa.Schema, column: str, uri: str, setting: str) -> pa.Field:
    """The field `column` of the file `uri`, as the config's `setting` names it.

    Raises:
        InputError: there is no such column; says which there are, and which may have been meant.
    """
    if schema.names.count(column) == 1:
        return schema.field(column)
    close = difflib.get_close_matches(column, schema.names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"{setting}: {uri} has no column {column!r}; it has {', '.join(schema.names) or 'none'}{hint}")


def is_string(kind: pa.DataType) -> bool:
    """Whether the values of a column are text, dictionary-encoded or not."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def image_column(schema: pa.Schema, images: ImagesConfig, uri: str) -> str | None:
    """The column that holds image files, or None if the file is a list of URIs.

    Raises:
        InputError: `images.bytes_column` is missing or of another type, or the file has neither URIs nor image files.
    """
    if images.bytes_column is not None:
        field = find_field(schema, images.bytes_column, uri, "images.bytes_column")
        if not _holds_bytes(field.type):
            raise InputError(f"images.bytes_column: {field.name!r} in {uri} is {field.type}, not binary")
        return images.bytes_column
    if images.uri_column in schema.names:
        return None
    found: list[str] = [field.name for field in schema if _holds_bytes(field.type)]
    if len(found) > 1:
        raise InputError(f"images.uri: {uri} has the binary columns {', '.join(found)}: name images.bytes_column")
    if not found:
        find_field(schema, images.uri_column, uri, "images.uri_column")
    return found[0]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
