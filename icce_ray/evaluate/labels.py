"""True labels, for evaluation only: from folders, from .cls files in tar shards, or from .npy, .csv or .parquet files,
which are read some rows at a time, since there may be a row for each image.

Only the evaluate stage and the checks before a run may import this.
"""

from __future__ import annotations

import hashlib
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
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
from icce_ray.errors import InputError, message_of
from icce_ray.images.containers import Cell, Span, labels_beside, locate
from icce_ray.images.embedding_files import read_npy_header
from icce_ray.images.listing import Listing
from icce_ray.images.parquet_columns import check_column, find_field, is_string, open_column, to_strings
from icce_ray.store.filesystem import open_uri

FOLDER = "folder"
WEBDATASET = "cls"
MAX_SHOWN = 3
MAX_DIGITS = 19
ROWS_AT_ONCE = 2**20
"""Rows of the listing that are looked through at a time."""
ENDINGS = (".npy", ".csv", ".parquet")
BATCH_ROWS = 65_536
Batch = tuple[list[str], list[str] | None]
"""Labels as text, and the names of their images; None if the labels are in the order of the images."""


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
    """The true classes of images, given by their URIs (n,) and ascending ids (n,), of `num_listed` in all. A file that
    names its images need not have all of them. Raises InputError: as :func:`check_labels`."""
    if evaluate.labels == FOLDER:
        return _encode(image_ids, _from_folders(uris))
    if evaluate.labels == WEBDATASET:
        return _encode(image_ids, _from_shards(uris))
    if not has_names(evaluate):
        return _encode(image_ids, _in_order(evaluate, image_ids, num_listed))
    rows = (row for labels, names in read_labels(evaluate) for row in zip(labels, names or (), strict=True))
    return _match(evaluate, rows, uris, image_ids)


def named_images(evaluate: EvaluateConfig, listing: Listing, max_names: int) -> TrueLabels:
    """All images that a label file with names has a label for, ascending. If it has more than `max_names` rows, a half,
    a quarter and so on of them are used, drawn by their names. Only these, and the URIs that they could mean, are in
    memory. Raises InputError: as :func:`check_labels`."""
    rows: list[tuple[str, str]] = []
    limit = 2**64
    for labels, names in read_labels(evaluate):
        rows += (row for row in zip(map(sys.intern, labels), names or (), strict=True) if _draw(row[1]) < limit)
        while len(rows) > max_names:
            limit //= 2
            rows = [row for row in rows if _draw(row[1]) < limit]
    ends = {_end(name) for _, name in rows}
    lengths = {end.count("/") + 1 for end in ends}
    ids, uris = [], []
    for start in range(0, len(listing), ROWS_AT_ONCE):
        for image_id, uri in enumerate(listing.table(start, start + ROWS_AT_ONCE)["uri"].to_pylist(), start):
            path = to_text(str(_path(uri)))
            if _end(uri) in ends or any(_last(path, length) in ends for length in lengths):
                ids.append(image_id)
                uris.append(uri)
    return _match(evaluate, rows, uris, np.array(ids, dtype=np.int64))


def check_labels(evaluate: EvaluateConfig, uris: Sequence[str] | None = None) -> None:
    """Refuse labels that cannot be used, before any work starts. Returns nothing, so no label leaves this module. If
    the images are not listed yet, or too many, only the label file is checked. Raises InputError: as
    :func:`read_labels`; a number of labels that is not the number of images, a name that fits several images or none of
    them any, images with a label of their own each."""
    if uris is not None:
        labels = load_labels(evaluate, uris, np.arange(len(uris)), len(uris))
        if 2 < len(labels.names) == len(labels.image_ids):
            raise InputError(
                f"evaluate.labels: {evaluate.labels}: each of {len(labels.names):,} images has a class of its own, "
                f"e.g. {', '.join(labels.names[:MAX_SHOWN])}; name the labels by which images belong together"
            )
    elif evaluate.labels not in (FOLDER, WEBDATASET):
        for _ in read_labels(evaluate):
            pass


def _from_folders(uris: Sequence[str]) -> list[str]:
    folders = [to_text(_path(uri).parent.name) for uri in uris]
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
    return [to_text(str(label)) for label in labels]


def _path(uri: str) -> PurePosixPath:
    """The path of an image. A member of a container counts as a file in the container's folder."""
    place = locate(uri)
    if isinstance(place, Span):
        return PurePosixPath(place.file).parent / uri.removeprefix(place.uri())
    if isinstance(place, Cell):
        return PurePosixPath(place.file)
    return PurePosixPath(unquote(uri) if uri.startswith("file://") else uri)


def _in_order(evaluate: EvaluateConfig, image_ids: npt.NDArray[np.int64], num_listed: int) -> list[str]:
    """(n,) labels of images, given ascending, from a file that has one for each listed image."""
    found, num_rows = list[str](), 0
    for labels, _ in read_labels(evaluate):
        first, last = np.searchsorted(image_ids, [num_rows, num_rows + len(labels)])
        found += (labels[image_id - num_rows] for image_id in image_ids[first:last].tolist())
        num_rows += len(labels)
    if num_rows != num_listed:
        raise InputError(
            f"evaluate.labels: {evaluate.labels} holds {num_rows:,} labels, but there are {num_listed:,} images. "
            "Without evaluate.uri_column there must be one for each image, in the order of the sorted URIs"
        )
    return found


def _match(
    evaluate: EvaluateConfig, rows: Iterable[tuple[str, str]], uris: Sequence[str], image_ids: npt.NDArray[np.int64]
) -> TrueLabels:
    """The labels of those images that `rows`, labels and names, have one for. A name is a whole URI or the end of one.
    Raises InputError: none has a label; a name fits several images; an image is named twice."""
    places_by_uri: dict[str, list[int]] = defaultdict(list)
    for place, uri in enumerate(uris):
        places_by_uri[_end(uri)].append(place)
    paths = [to_text(str(_path(uri))) for uri in uris]
    # By the last n components of the path, for each n that a name has: comparing all pairs would be quadratic.
    places_by_end: dict[int, dict[str, list[int]]] = {}
    labels: dict[int, str] = {}
    shown = list[str]()
    for label, name in rows:
        end = _end(name)
        length = end.count("/") + 1
        if length not in places_by_end:
            places_by_end[length] = defaultdict(list)
            for place, path in enumerate(paths):
                places_by_end[length][_last(path, length)].append(place)
        found = places_by_uri.get(end) or places_by_end[length].get(end, [])
        if len(found) > 1:
            raise InputError(
                f"evaluate.labels: {evaluate.labels}: {name!r} fits {len(found)} images "
                f"({', '.join(uris[place] for place in found[:MAX_SHOWN])}); give more of the path in column "
                f"{evaluate.uri_column!r}"
            )
        for place in found:
            if place in labels:
                raise InputError(f"evaluate.labels: {evaluate.labels} names the image {uris[place]} twice")
            labels[place] = label
        if len(shown) < MAX_SHOWN:
            shown.append(name)
    if not labels:
        raise InputError(
            f"evaluate.labels: {evaluate.labels}: column {evaluate.uri_column!r} fits none of the images: it holds "
            f"e.g. {', '.join(shown)}, and the images are e.g. {', '.join(uris[:MAX_SHOWN])}. It must hold "
            "the URIs of images or the ends of them"
        )
    places = sorted(labels)
    return _encode(image_ids[places], [labels[place] for place in places])


def _end(name: str) -> str:
    """A name, or a URI, as the end of a path."""
    return to_text(name).removeprefix("./").lstrip("/")


def _last(path: str, length: int) -> str:
    """The last components of a path."""
    return "/".join(path.rsplit("/", length)[-length:])


def _draw(name: str) -> int:
    """A number below 2**64 that is the same for all spellings of a name."""
    return int.from_bytes(hashlib.blake2b(_end(name).encode(errors="replace"), digest_size=8).digest(), "big")


def _encode(image_ids: npt.NDArray[np.int64], labels: Sequence[str]) -> TrueLabels:
    def order(name: str) -> tuple[bool, int, str]:
        is_number = name.lstrip("-").isdecimal() and len(name) < MAX_DIGITS
        return not is_number, int(name) if is_number else 0, name

    names = sorted(set(labels), key=order)
    codes = {name: code for code, name in enumerate(names)}
    return TrueLabels(image_ids, np.array([codes[label] for label in labels], dtype=np.int64), tuple(names))


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
