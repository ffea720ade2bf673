"""True labels, for evaluation only: from folders, from .cls files in tar shards, or from .npy, .csv or .parquet files.

Only the evaluate stage and the checks before a run may import this.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pc_csv
import pyarrow.fs as pafs

from icce_ray.config import EvaluateConfig
from icce_ray.errors import InputError
from icce_ray.images.containers import Cell, Span, labels_beside, locate
from icce_ray.images.listing import Listing
from icce_ray.images.parquet_columns import check_column, find_field, is_string, open_column, read_text
from icce_ray.store.filesystem import open_uri

FOLDER = "folder"
WEBDATASET = "cls"
ENDINGS = (".npy", ".csv", ".parquet")
MAX_SHOWN = 3
MAX_DIGITS = 19
ROWS_AT_ONCE = 2**20
"""Rows of the listing that are looked through at a time."""


@dataclass(frozen=True)
class TrueLabels:
    """Classes of n images."""

    image_ids: npt.NDArray[np.int64]
    """(n,)."""
    classes: npt.NDArray[np.int64]
    """(n,) indices into `names`."""
    names: tuple[str, ...]
    """Classes that occur: numbers in ascending order, then other names."""

    def classes_of(self, image_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The classes of other images, -1 for those that have no label here."""
        places = np.minimum(np.searchsorted(self.image_ids, image_ids), len(self.image_ids) - 1)
        return np.where(self.image_ids[places] == image_ids, self.classes[places], -1)

    def only(self, image_ids: npt.NDArray[np.int64]) -> TrueLabels:
        """Those of some of the images."""
        codes, classes = np.unique(self.classes_of(image_ids), return_inverse=True)
        return TrueLabels(image_ids, classes, tuple(self.names[code] for code in codes.tolist()))


def load_labels(
    evaluate: EvaluateConfig, uris: Sequence[str], image_ids: npt.NDArray[np.int64], num_listed: int
) -> TrueLabels:
    """The true classes of images. A file that names its images need not have all of them. Raises InputError: as
    :func:`check_labels`.

    Args:
        uris: (n,) of the images to label.
        num_listed: number of all listed images.
    """
    if evaluate.labels == FOLDER:
        return _encode(image_ids, _from_folders(uris))
    if evaluate.labels == WEBDATASET:
        return _encode(image_ids, _from_shards(uris))
    labels, names = _read(evaluate)
    if names is None:
        _check_length(evaluate, len(labels), num_listed)
        return _encode(image_ids, [labels[i] for i in image_ids])
    return _named(evaluate, labels, names, uris, image_ids)


def _named(
    evaluate: EvaluateConfig,
    labels: Sequence[str],
    names: Sequence[str],
    uris: Sequence[str],
    image_ids: npt.NDArray[np.int64],
) -> TrueLabels:
    rows_n = _match(evaluate, names, uris)
    found = np.flatnonzero(rows_n >= 0)
    return _encode(image_ids[found], [labels[row] for row in rows_n[found]])


def named_images(evaluate: EvaluateConfig, listing: Listing) -> TrueLabels:
    """All images that a label file with names has a label for, ascending. URIs are in memory for those alone that one
    of its names could mean. Raises InputError: as :func:`check_labels`."""
    labels, names = _read(evaluate)
    assert names is not None
    ends = {_text(name).rpartition("/")[2] for name in names}
    ids, uris = [], []
    for start in range(0, len(listing), ROWS_AT_ONCE):
        for image_id, uri in enumerate(listing.table(start, start + ROWS_AT_ONCE)["uri"].to_pylist(), start):
            if _text(_path(uri).name) in ends or _text(uri).rpartition("/")[2] in ends:
                ids.append(image_id)
                uris.append(uri)
    return _named(evaluate, labels, names, uris, np.array(ids, dtype=np.int64))


def check_labels(evaluate: EvaluateConfig, uris: Sequence[str] | None = None) -> None:
    """Refuse labels that cannot be used, before any work starts. Returns nothing, so no label leaves this module.

    Args:
        uris: of the listed images; None if they are not listed yet: then only the label file is checked.

    Raises:
        InputError: no such file, another format, no such column or two of that name, a type that cannot be a label, a
            row without a label, a number of labels that is not the number of images, a name that fits several images
            or none of them any, images with a label of their own each.
    """
    if evaluate.labels in (FOLDER, WEBDATASET):
        if uris is not None and evaluate.labels == FOLDER:
            _check_repeated(evaluate, _from_folders(uris))
        elif uris is not None:
            _from_shards(uris)
        return
    labels, names = _read(evaluate)
    if uris is None:
        return
    if names is None:
        _check_length(evaluate, len(labels), len(uris))
    else:
        _match(evaluate, names, uris)
    _check_repeated(evaluate, labels)


def _from_folders(uris: Sequence[str]) -> list[str]:
    folders = [_text(_path(uri).parent.name) for uri in uris]
    if len(set(folders)) < 2:
        raise InputError(
            f"evaluate.labels: 'folder', but all images are in one folder, {_path(uris[0]).parent}; name a label file, "
            "or leave evaluate.labels out"
        )
    return folders


def _from_shards(uris: Sequence[str]) -> list[str]:
    labels = labels_beside(uris)
    without = [uri for uri, label in zip(uris, labels, strict=True) if not label]
    if without:
        raise InputError(
            f"evaluate.labels: 'cls', but {len(without):,} of {len(uris):,} images have no .cls file beside them in a "
            f"tar shard, e.g. {', '.join(without[:MAX_SHOWN])}"
        )
    return [_text(str(label)) for label in labels]


def _path(uri: str) -> PurePosixPath:
    """The path of an image. A member of a container counts as a file in the container's folder."""
    place = locate(uri)
    if isinstance(place, Span):
        return PurePosixPath(place.file).parent / uri.removeprefix(place.uri())
    if isinstance(place, Cell):
        return PurePosixPath(place.file)
    return PurePosixPath(unquote(uri) if uri.startswith("file://") else uri)


def _read(evaluate: EvaluateConfig) -> tuple[list[str], list[str] | None]:
    """The labels as text, and the names of their images; None if they are in the order of the images."""
    uri = str(evaluate.labels)
    ending = PurePosixPath(uri).suffix.lower()
    if ending not in ENDINGS:
        raise InputError(f"evaluate.labels: {uri}: give 'folder', 'cls', or a file that ends with {', '.join(ENDINGS)}")
    filesystem, path = open_uri(uri)
    if filesystem.get_file_info(path).type != pafs.FileType.File:
        raise InputError(f"evaluate.labels: {uri}: there is no such file")
    with filesystem.open_input_file(path) as file:
        try:
            if ending == ".npy":
                array = np.lib.format.read_array(file, allow_pickle=False)
                array = np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
            elif ending == ".parquet":
                table = _read_columns(file, evaluate, uri)
            else:
                # As text: type inference would turn 1, 01 and 001 into the same number.
                text = {name: pa.string() for name in (evaluate.label_column, evaluate.uri_column) if name}
                table = pc_csv.read_csv(file, convert_options=pc_csv.ConvertOptions(column_types=text))
                _check_separator(table.column_names)
        except InputError:
            raise
        except (pa.ArrowException, OSError, ValueError, EOFError) as error:
            raise InputError(f"evaluate.labels: {uri}: cannot be read: {' '.join(str(error).split())}") from None
    if ending == ".npy":
        if array.ndim != 1 or array.dtype.kind not in "iubUSf":
            raise InputError(
                f"evaluate.labels: {uri} holds {array.dtype} of shape {array.shape}; give one whole number or text per "
                "image"
            )
        return _labels(array.tolist(), uri), None
    labels = _labels(_column(table, "label_column", evaluate.label_column, uri).to_pylist(), uri)
    if evaluate.uri_column is None:
        return labels, None
    names = _column(table, "uri_column", evaluate.uri_column, uri)
    if not _is_text(names.type) or names.null_count:
        what = "empty rows" if _is_text(names.type) else f"{names.type}"
        raise InputError(f"evaluate.uri_column: {uri}: column {evaluate.uri_column!r} holds {what}; give text")
    return labels, names.to_pylist()


def _read_columns(opened: Any, evaluate: EvaluateConfig, uri: str) -> pa.Table:
    """The label and URI columns. Raises InputError: there is no such column; ArrowInvalid, ValueError: not UTF-8, or
    texts of absurd size."""
    columns = {"label_column": evaluate.label_column, "uri_column": evaluate.uri_column}
    found: dict[str, pa.ChunkedArray] = {}
    for setting, name in columns.items():
        if name is not None:
            file = open_column(opened, name)
            kind = find_field(file.schema_arrow, name, uri, f"evaluate.{setting}").type
            check_column(file, name)
            found[name] = read_text(file, name) if is_string(kind) else file.read(columns=[name])[name]
    return pa.table(found)


def _check_separator(names: Sequence[str]) -> None:
    if len(names) == 1 and (found := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise ValueError(f"its columns are separated by {found!r}; separate them by commas")


def _column(table: pa.Table, setting: str, name: str, uri: str) -> pa.ChunkedArray:
    find_field(table.schema, name, uri, f"evaluate.{setting}")
    column = table[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if setting == "label_column" and not (
        _is_text(kind) or pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    ):
        raise InputError(f"evaluate.{setting}: {uri}: column {name!r} holds {kind}; labels are whole numbers or text")
    return column


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _labels(values: Sequence[Any], uri: str) -> list[str]:
    """The labels as text. Refuses missing ones and fractions."""
    if not len(values):
        raise InputError(f"evaluate.labels: {uri} holds no labels")
    labels = []
    for row, value in enumerate(values):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        label = "" if value is None else _text(str(value))
        if label.lower() in ("", "nan"):
            raise InputError(
                f"evaluate.labels: {uri}: row {row} has no label ({value!r}); fill it in, or leave evaluate.labels out"
            )
        if isinstance(value, float):
            raise InputError(f"evaluate.labels: {uri}: row {row} holds {value}; labels are whole numbers or text")
        labels.append(label)
    return labels


def _text(value: str) -> str:
    """`value` in Unicode's normal form C and stripped, so that labels that look equal are equal."""
    return unicodedata.normalize("NFC", value.strip())


def _check_length(evaluate: EvaluateConfig, num_labels: int, num_images: int) -> None:
    if num_labels != num_images:
        raise InputError(
            f"evaluate.labels: {evaluate.labels} holds {num_labels:,} labels, but there are {num_images:,} images. "
            "Without evaluate.uri_column there must be one for each image, in the order of the sorted URIs"
        )


def _check_repeated(evaluate: EvaluateConfig, labels: Sequence[str]) -> None:
    if len(labels) > 2 and len(set(labels)) == len(labels):
        raise InputError(
            f"evaluate.labels: {evaluate.labels}: each of {len(labels):,} images has a class of its own, e.g. "
            f"{', '.join(labels[:MAX_SHOWN])}; name the labels by which images belong together"
        )


def _match(evaluate: EvaluateConfig, names: Sequence[str], uris: Sequence[str]) -> npt.NDArray[np.int64]:
    """(n,) row of the label file for each image, -1 if it has none. A name is a whole URI or the end of one. Raises
    InputError: none has a label; a name fits several images; an image is named twice."""
    ids_by_uri: dict[str, list[int]] = defaultdict(list)
    for image_id, uri in enumerate(uris):
        ids_by_uri[_text(uri)].append(image_id)
    paths = [_text(str(_path(uri))) for uri in uris]
    # By the last n components of the path, for each n that a name has: comparing all pairs would be quadratic.
    ids_by_end: dict[int, dict[str, list[int]]] = {}
    rows_M = np.full(len(uris), -1, dtype=np.int64)
    for row, name in enumerate(names):
        end = _text(name).removeprefix("./").lstrip("/")
        length = end.count("/") + 1
        if length not in ids_by_end:
            ids_by_end[length] = defaultdict(list)
            for image_id, path in enumerate(paths):
                ids_by_end[length]["/".join(path.rsplit("/", length)[-length:])].append(image_id)
        found = ids_by_uri.get(_text(name)) or ids_by_end[length].get(end, [])
        if len(found) > 1:
            shown = ", ".join(uris[i] for i in found[:MAX_SHOWN])
            raise InputError(
                f"evaluate.labels: {evaluate.labels}: {name!r} fits {len(found)} images ({shown}); "
                f"give more of the path in column {evaluate.uri_column!r}"
            )
        for image_id in found:
            if rows_M[image_id] >= 0:
                raise InputError(f"evaluate.labels: {evaluate.labels} names the image {uris[image_id]} twice")
            rows_M[image_id] = row
    if len(uris) and (rows_M < 0).all():
        raise InputError(
            f"evaluate.labels: {evaluate.labels}: column {evaluate.uri_column!r} fits none of the images: it holds "
            f"e.g. {', '.join(names[:MAX_SHOWN])}, and the images are e.g. {', '.join(uris[:MAX_SHOWN])}. It must hold "
            "the URIs of images or the ends of them"
        )
    return rows_M


def _encode(image_ids: npt.NDArray[np.int64], labels: Sequence[str]) -> TrueLabels:
    def order(name: str) -> tuple[bool, int, str]:
        is_number = name.lstrip("-").isdecimal() and len(name) < MAX_DIGITS
        return not is_number, int(name) if is_number else 0, name

    names = sorted(set(labels), key=order)
    codes = {name: code for code, name in enumerate(names)}
    return TrueLabels(image_ids, np.array([codes[label] for label in labels], dtype=np.int64), tuple(names))
