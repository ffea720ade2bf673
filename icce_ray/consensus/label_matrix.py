"""The label matrix: what H heads say of N images, in memory (here) or on storage (stored.py).

Whatever a consensus needs of it is asked for in pieces, and the answers add up or are laid side by side. So it is the
same code that runs in one process and, piece by piece, on a cluster (job.py). A label of -1 means missing.

Shape letters: N images, n of a piece, H heads, K clusters of the consensus, C head clusters (the clusters of all heads,
head after head, C = sum of K_h).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.errors import InputError

Labels = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]

MISSING = -1
PIECE_LABELS = 4_000_000
"""Labels (heads times images) of a piece, about: 16 MB."""


class Heads(ABC):
    """The labels of H heads, the clusters of each numbered without gaps.

    ``values[h][code]`` is the label that the caller used for the cluster `code` of head h; ``offsets[h] + code``
    numbers the clusters of all heads, 0..C-1.
    """

    values: tuple[npt.NDArray[np.int64], ...]

    @property
    @abstractmethod
    def num_images(self) -> int: ...

    @abstractmethod
    def read(self, start: int, stop: int, heads: slice = slice(None)) -> HeadLabels:
        """The labels of the images start..stop-1, of some of the heads."""

    def map(self, function: Callable[..., Any], pieces: Iterable[tuple[int, ...]], *shared: Any) -> Iterator[Any]:
        """``function(self, *piece, *shared)`` for each piece, in their order. A cluster does several at a time."""
        for piece in pieces:
            yield function(self, *piece, *shared)

    @property
    def num_heads(self) -> int:
        return len(self.values)

    @property
    def num_clusters(self) -> Counts:
        """Clusters K_h of each head (H,)."""
        return np.array([len(values) for values in self.values], dtype=np.int64)

    @property
    def offsets(self) -> Counts:
        """First head cluster of each head, and C: H+1 numbers."""
        return np.concatenate([[0], np.cumsum(self.num_clusters)]).astype(np.int64)

    @property
    def num_head_clusters(self) -> int:
        return int(self.num_clusters.sum())

    def image_pieces(self) -> list[tuple[int, int]]:
        """(start, stop) of stretches of images, for what needs all heads of an image."""
        return _stretches(self.num_images, max(1, PIECE_LABELS // self.num_heads))

    def head_pieces(self) -> list[tuple[int, int, int, int]]:
        """(start, stop, first head, end of heads): few heads of many images, for tables with a column per head
        cluster."""
        images = min(max(1, self.num_images), PIECE_LABELS)
        heads = _stretches(self.num_heads, max(1, PIECE_LABELS // images))
        return [(*image, *head) for image in _stretches(self.num_images, images) for head in heads]

    def gather(self, heads: slice = slice(None)) -> HeadLabels:
        """The whole matrix, or some of its rows, in this process."""
        pieces = [(start, stop, *heads.indices(self.num_heads)[:2]) for start, stop in self.image_pieces()]
        return HeadLabels(np.concatenate(list(self.map(_read_codes, pieces)), axis=1), self.values[heads])

    def head_cluster_sizes(self) -> Counts:
        """Images per head cluster (C,)."""
        sizes_C = np.zeros(self.num_head_clusters, dtype=np.int64)
        pieces = self.head_pieces()
        for (_, _, first, end), sizes in zip(pieces, self.map(_count_codes, pieces), strict=True):
            sizes_C[self.offsets[first] : self.offsets[end]] += sizes
        return sizes_C


@dataclass(frozen=True)
class HeadLabels(Heads):
    """Labels in memory: ``codes[h, i]`` (H, N) is the cluster 0..K_h-1 that head h gives image i, or -1."""

    codes: Labels
    values: tuple[npt.NDArray[np.int64], ...]

    @property
    def num_images(self) -> int:
        return int(self.codes.shape[1])

    def read(self, start: int, stop: int, heads: slice = slice(None)) -> HeadLabels:
        return HeadLabels(self.codes[heads, start:stop], self.values[heads])

    def columns(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Head clusters (n, H) of the images start..stop-1, -1 where a head's label is missing."""
        codes_nH = self.codes[:, start:stop].T
        return np.where(codes_nH >= 0, codes_nH + self.offsets[:-1], MISSING)


def _stretches(total: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def _read_codes(heads: Heads, start: int, stop: int, first: int, end: int) -> Labels:
    return heads.read(start, stop, slice(first, end)).codes


def _count_codes(heads: Heads, start: int, stop: int, first: int, end: int) -> Counts:
    part = heads.read(start, stop, slice(first, end))
    return np.concatenate(
        [count_labels(codes_n, len(values)) for codes_n, values in zip(part.codes, part.values, strict=True)]
    )


def count_labels(labels_N: npt.NDArray[Any], num_clusters: int) -> Counts:
    """Images per cluster (num_clusters,); missing labels are left out."""
    return np.bincount(labels_N[labels_N >= 0], minlength=num_clusters).astype(np.int64, copy=False)


@dataclass(frozen=True)
class Survey:
    """What a stretch of images says about the matrix: the labels of each head, ascending; the lowest label; how many
    images have no label at all, and the first of them."""

    values: tuple[npt.NDArray[np.int64], ...]
    lowest: int
    num_unlabelled: int
    first_unlabelled: int | None


def survey(matrix_Hn: npt.NDArray[Any], start: int = 0) -> Survey:
    """Look at the labels of the images from `start` on."""
    unlabelled = np.flatnonzero((matrix_Hn < 0).all(axis=0))
    lowest = int(matrix_Hn.min())
    values = tuple(_used_labels(labels_n) for labels_n in matrix_Hn) if lowest >= MISSING else ()
    return Survey(values, lowest, len(unlabelled), start + int(unlabelled[0]) if len(unlabelled) else None)


def check_surveys(surveys: Sequence[Survey]) -> tuple[npt.NDArray[np.int64], ...]:
    """The labels that each head uses, ascending, from the surveys of all images in their order.

    Raises:
        InputError: a label below -1, a head or an image without any label.
    """
    lowest = min(part.lowest for part in surveys)
    if lowest < MISSING:
        raise InputError(f"the label matrix holds {lowest}; labels start at 0, and -1 means missing")
    values = tuple(np.unique(np.concatenate(of_head)) for of_head in zip(*(s.values for s in surveys), strict=True))
    for head, head_values in enumerate(values):
        if not len(head_values):
            raise InputError(f"head {head} has no label for any image (all are -1); leave it out")
    num_unlabelled = sum(part.num_unlabelled for part in surveys)
    if num_unlabelled:
        first = next(part.first_unlabelled for part in surveys if part.num_unlabelled)
        raise InputError(
            f"{num_unlabelled} images have no label from any head (the first is image {first}); leave them out"
        )
    return values


def check_matrix(shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
    """Refuse what is no label matrix.

    Raises:
        InputError: not two-dimensional, empty, or not of integers.
    """
    if len(shape) != 2:
        raise InputError(f"the label matrix has shape {shape}; it must be two-dimensional: (heads, images)")
    if not np.issubdtype(dtype, np.integer):
        raise InputError(f"the labels are {np.dtype(dtype)}; they must be integers (-1 where a label is missing)")
    if 0 in shape:
        raise InputError(f"the label matrix has shape {shape}; it needs at least one head and one image")


def encode_heads(labels_HN: npt.ArrayLike) -> HeadLabels:
    """Check a label matrix and number each head's clusters without gaps, in the order of their labels.

    Args:
        labels_HN: (H, N) integers; row h holds head h's cluster of each image, -1 where it gave none.

    Raises:
        InputError: not two-dimensional, empty, not integers, a label below -1, a head or an image without any label.
    """
    matrix = np.asarray(labels_HN)
    check_matrix(matrix.shape, matrix.dtype)
    values = check_surveys([survey(matrix)])
    codes = [encode_labels(labels_N, head_values) for labels_N, head_values in zip(matrix, values, strict=True)]
    return HeadLabels(np.stack(codes), values)


def encode_labels(labels_n: npt.NDArray[Any], values: npt.NDArray[np.int64]) -> Labels:
    """Place of each label in `values`, which holds them all, ascending; -1 stays."""
    largest = int(values[-1])
    if largest > 4 * len(values) + 1000:
        codes_n = np.searchsorted(values, labels_n).astype(np.int32)
        codes_n[labels_n < 0] = MISSING
        return codes_n
    code_of_label = np.full(largest + 2, MISSING, dtype=np.int32)  # the missing label, -1, is the spare last place
    code_of_label[values] = np.arange(len(values), dtype=np.int32)
    codes: Labels = code_of_label[labels_n]
    return codes


def _used_labels(labels_n: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    largest = int(labels_n.max())
    if largest > 4 * len(labels_n) + 1000:
        values = np.unique(labels_n)
        return values[values >= 0].astype(np.int64)
    is_used = np.zeros(largest + 2, dtype=bool)
    is_used[labels_n] = True  # the missing label, -1, marks the spare last place
    is_used[-1] = False
    return np.flatnonzero(is_used)
