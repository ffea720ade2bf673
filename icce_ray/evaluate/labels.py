"""True labels, for evaluation only: from the folders of the images, or a .npy, .csv or .parquet file.

Nothing but the evaluate stage may import this.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pc_csv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.config import Config, EvaluateConfig
from icce_ray.errors import InputError
from icce_ray.images.containers import labels_beside
from icce_ray.store.filesystem import open_uri

FOLDER = "folder"
WEBDATASET = "cls"
ENDINGS = (".npy", ".csv", ".parquet")
MAX_SHOWN = 3


@dataclass(frozen=True)
class TrueLabels:
    """Classes of n images."""

    classes: npt.NDArray[np.int64]
    """(n,) indices into `names`."""
    names: tuple[str, ...]
    """Classes that occur, in ascending order (numbers as numbers)."""


def load_labels(config: Config, images_table: pa.Table, image_ids: npt.NDArray[np.int64]) -> TrueLabels:
    """The true class of each image of `image_ids`.

    Args:
        images_table: all listed images: image_id 0..M-1, uri.
        image_ids: (n,) those wanted.

    Raises:
        InputError: as :func:`check_labels`; a wanted image without a label; a label file that names an image twice.
    """
    evaluate = config.evaluate
    assert evaluate.labels is not None
    uris = images_table["uri"].to_pylist()
    if evaluate.labels == FOLDER:
        return _encode(_from_folders([uris[i] for i in image_ids]))
    if evaluate.labels == WEBDATASET:
        return _encode(_from_shards([uris[i] for i in image_ids]))
    values, names = _read(evaluate)
    if names is None:
        _check_length(evaluate, len(values), len(uris))
        return _encode(_without_nulls(evaluate, values, image_ids))
    rows_M = _match(evaluate, names, uris)
    unmatched = image_ids[rows_M[image_ids] < 0]
    if len(unmatched):
        raise InputError(
            f"evaluate.labels: {evaluate.labels} has no label for {len(unmatched):,} of {len(image_ids):,} images, "
            f"e.g. {', '.join(uris[i] for i in unmatched[:MAX_SHOWN])}; column {evaluate.uri_column!r} holds e.g. "
            f"{', '.join(names[:MAX_SHOWN])}. It must name an image by its URI or the end of it"
        )
    return _encode(_without_nulls(evaluate, values, rows_M[image_ids]))


def check_labels(config: Config, images_table: pa.Table | None = None) -> None:
    """Refuse labels that cannot be used, before the work starts. Nothing is returned: no label leaves this module here.

    Args:
        images_table: the listed images; None where they are not listed yet, then only the file is looked at.

    Raises:
        InputError: no such file, another format, no such column, a number of labels that is not the number of images,
            labels by folder where there is one folder only.
    """
    evaluate = config.evaluate
    if evaluate.labels is None:
        return
    if evaluate.labels == FOLDER:
        if images_table is not None:
            _from_folders(images_table["uri"].to_pylist())
        return
    if evaluate.labels == WEBDATASET:
        return
    values, names = _read(evaluate)
    if names is None and images_table is not None:
        _check_length(evaluate, len(values), len(images_table))


def _from_folders(uris: list[str]) -> list[str]:
    folders = [unquote(PurePosixPath(uri).parent.name) for uri in uris]
    if len(set(folders)) < 2:
        raise InputError(
            f"evaluate.labels: 'folder', but all images lie in one folder, {PurePosixPath(uris[0]).parent}; name "
            "a label file, or leave evaluate.labels out"
        )
    return folders


def _from_shards(uris: list[str]) -> list[Any]:
    labels = labels_beside(uris)
    without = [uri for uri, label in zip(uris, labels, strict=True) if label is None]
    if without:
        raise InputError(
            f"evaluate.labels: 'cls', but {len(without):,} of {len(uris):,} images have no .cls file beside them in a "
            f"tar shard, e.g. {', '.join(without[:MAX_SHOWN])}"
        )
    texts = [str(label) for label in labels]
    return [int(text) for text in texts] if all(text.isdecimal() for text in texts) else texts


def _read(evaluate: EvaluateConfig) -> tuple[list[Any], list[str] | None]:
    """The labels, and the names of the images they belong to, or None where they come in the order of the images."""
    uri = str(evaluate.labels)
    ending = PurePosixPath(uri).suffix.lower()
    if ending not in ENDINGS:
        raise InputError(
            f"evaluate.labels: {uri}: labels are 'folder', 'cls', or a file that ends with {', '.join(ENDINGS)}"
        )
    filesystem, path = open_uri(uri)
    if filesystem.get_file_info(path).type != pafs.FileType.File:
        raise InputError(f"evaluate.labels: {uri}: there is no such file")
    with filesystem.open_input_file(path) as file:
        try:
            if ending == ".npy":
                return _read_array(uri, file), None
            table = pq.read_table(file) if ending == ".parquet" else pc_csv.read_csv(file)
        except (pa.ArrowInvalid, OSError, ValueError, EOFError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"evaluate.labels: {uri}: cannot be read: {' '.join(str(error).split())}") from None
    labels = _column(table, "label_column", evaluate.label_column, uri)
    if evaluate.uri_column is None:
        return labels, None
    names = _column(table, "uri_column", evaluate.uri_column, uri)
    return labels, [str(name) for name in names]


def _read_array(uri: str, file: Any) -> list[Any]:
    array = np.lib.format.read_array(file, allow_pickle=False)
    if array.ndim != 1 or array.dtype.kind not in "iubUSf":
        raise InputError(f"evaluate.labels: {uri} holds {array.dtype} of shape {array.shape}; give one label per image")
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and (array == array.round()).all()):
            raise InputError(f"evaluate.labels: {uri} holds fractions; labels are whole numbers or names")
        array = array.astype(np.int64)
    values: list[Any] = array.tolist()
    return values


def _column(table: pa.Table, setting: str, name: str, uri: str) -> list[Any]:
    if name not in table.column_names:
        close = difflib.get_close_matches(name, table.column_names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"evaluate.{setting}: {uri} has no column {name!r}; it has {', '.join(table.column_names)}{hint}"
        )
    values: list[Any] = table[name].to_pylist()
    return values


def _check_length(evaluate: EvaluateConfig, num_labels: int, num_images: int) -> None:
    if num_labels != num_images:
        raise InputError(
            f"evaluate.labels: {evaluate.labels} holds {num_labels:,} labels, but there are {num_images:,} images. "
            "Without evaluate.uri_column there must be one for each image, in the order of the sorted URIs"
        )


def _match(evaluate: EvaluateConfig, names: list[str], uris: list[str]) -> npt.NDArray[np.int64]:
    """(M,) row of the label file for each image, -1 where it has none. A name is a whole URI or the end of one."""
    by_basename: dict[str, list[int]] = defaultdict(list)
    for image_id, uri in enumerate(uris):
        by_basename[uri.rpartition("/")[2]].append(image_id)
    rows_M = np.full(len(uris), -1, dtype=np.int64)
    for row, name in enumerate(names):
        ending = "/" + name.removeprefix("./").lstrip("/")
        candidates = by_basename.get(ending.rpartition("/")[2], [])
        found = [i for i in candidates if uris[i] == name] or [i for i in candidates if f"/{uris[i]}".endswith(ending)]
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
    return rows_M


def _without_nulls(evaluate: EvaluateConfig, values: list[Any], rows: npt.NDArray[np.int64]) -> list[Any]:
    taken = [values[row] for row in rows]
    if None in taken:
        raise InputError(f"evaluate.labels: {evaluate.labels}: row {rows[taken.index(None)]} has no label")
    return taken


def _encode(values: list[Any]) -> TrueLabels:
    names = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    codes = {name: code for code, name in enumerate(names)}
    return TrueLabels(np.array([codes[value] for value in values], dtype=np.int64), tuple(str(name) for name in names))
