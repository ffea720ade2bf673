"""Files of true labels: .npy, .csv or .parquet, read some rows at a time, since there may be a row for each image."""

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc_csv
import pyarrow.fs as pafs

from icce_ray.config import EvaluateConfig
from icce_ray.errors import InputError, message_of
from icce_ray.images.embedding_files import read_npy_header
from icce_ray.images.parquet_columns import check_column, find_field, is_string, open_column, to_strings
from icce_ray.store.filesystem import open_uri

ENDINGS = (".npy", ".csv", ".parquet")
BATCH_ROWS = 65_536
Batch = tuple[list[str], list[str] | None]
"""Labels as text, and the names of their images; None if the labels are in the order of the images."""


def read_labels(evaluate: EvaluateConfig) -> Iterator[Batch]:
    """All rows of the file, in order. Raises InputError: no such file, another format, no such column or two of that
    name, a type that cannot be a label, a row without a label, a name that is not text, no rows."""
    uri = str(evaluate.labels)
    ending = PurePosixPath(uri).suffix.lower()
    if ending not in ENDINGS:
        raise InputError(f"evaluate.labels: {uri}: give 'folder', 'cls', or a file that ends with {', '.join(ENDINGS)}")
    filesystem, path = open_uri(uri)
    if filesystem.get_file_info(path).type != pafs.FileType.File:
        raise InputError(f"evaluate.labels: {uri}: there is no such file")
    first = 0
    with filesystem.open_input_file(path) as file:
        try:
            if ending == ".npy":
                batches: Iterator[tuple[list[Any], list[str] | None]] = _read_npy(file, uri)
            else:
                tables = _read_parquet(file, evaluate, uri) if ending == ".parquet" else _read_csv(file, evaluate, uri)
                batches = (_columns(table, evaluate, uri) for table in tables)
            for values, names in batches:
                yield _to_labels(values, first, uri), names
                first += len(values)
        except InputError:
            raise
        except (pa.ArrowException, OSError, ValueError, EOFError) as error:
            raise InputError(f"evaluate.labels: {uri}: cannot be read: {message_of(error)}") from None
    if not first:
        raise InputError(f"evaluate.labels: {uri} holds no labels")


def has_names(evaluate: EvaluateConfig) -> bool:
    """Whether the labels are in a file that names its images."""
    return evaluate.uri_column is not None and PurePosixPath(str(evaluate.labels)).suffix.lower() in ENDINGS[1:]


def to_text(value: str) -> str:
    """`value` in Unicode's normal form C and stripped, so that labels that look equal are equal."""
    return unicodedata.normalize("NFC", value.strip())


def _read_npy(file: Any, uri: str) -> Iterator[tuple[list[Any], list[str] | None]]:
    shape, dtype = read_npy_header(file)
    if len(shape) != 1 or dtype.kind not in "iubUSf":
        raise InputError(
            f"evaluate.labels: {uri} holds {dtype} of shape {shape}; give one whole number or text per image"
        )
    for start in range(0, shape[0], BATCH_ROWS):
        values = np.frombuffer(file.read(min(BATCH_ROWS, shape[0] - start) * dtype.itemsize), dtype)
        yield (np.char.decode(values, "utf-8") if dtype.kind == "S" else values).tolist(), None


def _read_csv(file: Any, evaluate: EvaluateConfig, uri: str) -> Iterator[Any]:
    names = pc_csv.open_csv(file).schema.names
    if len(names) == 1 and (found := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise ValueError(f"its columns are separated by {found!r}; separate them by commas")
    _check_columns(pa.schema([(name, pa.string()) for name in names]), evaluate, uri)
    file.seek(0)
    # As text: type inference would turn 1, 01 and 001 into the same number.
    text = {name: pa.string() for name in (evaluate.label_column, evaluate.uri_column) if name is not None}
    yield from pc_csv.open_csv(
        file, convert_options=pc_csv.ConvertOptions(column_types=text, include_columns=list(text))
    )


def _read_parquet(opened: Any, evaluate: EvaluateConfig, uri: str) -> Iterator[Any]:
    columns = [name for name in (evaluate.label_column, evaluate.uri_column) if name is not None]
    file = open_column(opened, *columns)
    _check_columns(file.schema_arrow, evaluate, uri)
    for name in columns:
        check_column(file, name)
    for batch in file.iter_batches(BATCH_ROWS, columns=columns):
        table = pa.Table.from_batches([batch])
        yield {name: to_strings(table[name], name) if is_string(table[name].type) else table[name] for name in columns}


def _check_columns(schema: pa.Schema, evaluate: EvaluateConfig, uri: str) -> None:
    wanted = {"label_column": "labels are whole numbers or text", "uri_column": "give text"}
    for setting, what in wanted.items():
        if (name := getattr(evaluate, setting)) is not None:
            kind = find_field(schema, name, uri, f"evaluate.{setting}").type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            is_number = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
            if not (is_string(kind) or (setting == "label_column" and is_number)):
                raise InputError(f"evaluate.{setting}: {uri}: column {name!r} holds {kind}; {what}")


def _columns(table: Any, evaluate: EvaluateConfig, uri: str) -> tuple[list[Any], list[str] | None]:
    values = table[evaluate.label_column].to_pylist()
    if evaluate.uri_column is None:
        return values, None
    names = table[evaluate.uri_column]
    if names.null_count:
        raise InputError(f"evaluate.uri_column: {uri}: column {evaluate.uri_column!r} holds empty rows; give text")
    return values, names.to_pylist()


def _to_labels(values: Sequence[Any], first: int, uri: str) -> list[str]:
    """The labels as text. Refuses missing ones and fractions."""
    labels = []
    for row, value in enumerate(values, first):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        label = "" if value is None else to_text(str(value))
        if label.lower() in ("", "nan"):
            raise InputError(
                f"evaluate.labels: {uri}: row {row} has no label ({value!r}); fill it in, or leave evaluate.labels out"
            )
        if isinstance(value, float):
            raise InputError(f"evaluate.labels: {uri}: row {row} holds {value}; labels are whole numbers or text")
        labels.append(label)
    return labels
