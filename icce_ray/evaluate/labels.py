"""True labels, for evaluation only: from folders, from .cls files in tar shards, or from files (label_files.py).

Only the evaluate stage and the checks before a run may import this.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from icce_ray.config import EvaluateConfig
from icce_ray.errors import InputError
from icce_ray.evaluate.label_files import has_names, read_labels, to_text
from icce_ray.images.containers import Cell, Span, labels_beside, locate
from icce_ray.images.listing import Listing
from icce_ray.sample.training_set import find_ids

FOLDER = "folder"
WEBDATASET = "cls"
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
        places = find_ids(self.image_ids, image_ids)
        return np.where(places >= 0, self.classes[places], -1)

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
