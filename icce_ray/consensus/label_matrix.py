"""The label matrix: H clusterings ("heads") of N images, in memory or, in stored_label_matrix.py, on storage.

A consensus reads it part by part, and the results of the parts add up or are concatenated. So the same code runs in one
process and, on a cluster, as a task for each part (job.py). A consensus is judged by its contingency counts with the
heads, which add up over images. A label of -1 means missing. Hashes of labels break ties without bias and find images
that all heads label alike.

Shape letters: N images, n images of a part, H heads, C head clusters (the clusters of all heads, head after head), K
clusters of the consensus.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from icce_ray.consensus.partition import PartitionError
from icce_ray.errors import InputError
from icce_ray.metrics.contingency import anmi_from_counts, cell_numbers
from icce_ray.random_numbers import GOLDEN_GAMMA, mix64

SECOND_GAMMA = np.uint64(0xD1B54A32D192ED03)
Labels = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]
Images = npt.NDArray[np.int64]
MISSING = -1
PART_LABELS = 1 << 21
"""Labels (heads times images) of a part, about. Work on a part takes about 100 bytes a label."""


def hash_numbers(a: npt.NDArray[Any], b: npt.NDArray[Any], seed: int) -> npt.NDArray[np.uint64]:
    """Evenly spread 64-bit numbers that depend on `a`, `b` and the seed only."""
    mixed = mix64(a.astype(np.uint64) * GOLDEN_GAMMA + np.uint64(seed))
    return mix64(mixed + b.astype(np.uint64) * SECOND_GAMMA)


def group_equal_images(heads: HeadLabels, num_clusters: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Groups of images that all heads label alike: the first image of each group (G,), and the group of each image
    (N,).

    Groups are compared by a 64-bit hash of the labels: among a million groups, two collide with probability 1e-7.
    Raises PartitionError: there are fewer groups than `num_clusters`."""
    keys_N = np.zeros(heads.num_images, dtype=np.uint64)
    for codes_N in heads.codes:
        keys_N = hash_numbers(keys_N, codes_N + 1, seed=0)
    _, first_G, group_N = np.unique(keys_N, return_index=True, return_inverse=True)
    if len(first_G) < num_clusters:
        raise PartitionError(f"only {len(first_G)} images differ in their labels, fewer than {num_clusters} clusters")
    return first_G, group_N


class Heads(ABC):
    """The labels of H heads, the clusters of each numbered without gaps.

    ``values[h][code]`` is the label that the caller used for the cluster `code` of head h; ``offsets[h] + code``
    numbers the clusters of all heads, 0..C-1.
    """

    values: tuple[npt.NDArray[np.int64], ...]
    unlabelled: Images
    """(U,) ascending: the images of the matrix that no head labels, noise. They are left out of everything here, and
    the others are numbered without gaps."""

    @property
    @abstractmethod
    def num_images(self) -> int: ...

    @abstractmethod
    def read(self, start: int, stop: int, heads: slice = slice(None)) -> HeadLabels:
        """The labels of the images start..stop-1 by some of the heads."""

    @abstractmethod
    def labels_of(self, head: int) -> npt.NDArray[Any]:
        """Labels (N,) of one head, -1 where missing: equal for images of the same cluster. May be memory-mapped."""

    @abstractmethod
    def select(self, heads: Sequence[int]) -> Heads:
        """Some of the heads. They must label every image that is not in `unlabelled`."""

    def spread(self, values_n: npt.NDArray[Any], fill: float) -> npt.NDArray[Any]:
        """A value for each image of the matrix, from those of its labelled images: `fill` where there is none."""
        return np.insert(values_n, self.unlabelled - np.arange(len(self.unlabelled)), fill)

    @property
    def noise(self) -> str:
        """What is said where images that no head labels are in the way; "" if there are none."""
        return f"no clustering has a label for {len(self.unlabelled):,} of the images" if len(self.unlabelled) else ""

    def map(self, function: Callable[..., Any], parts: Iterable[tuple[int, ...]], *shared: Any) -> Iterator[Any]:
        """``function(self, *part, *shared)`` for each part, in order. On a cluster, several parts run at a time."""
        for part in parts:
            yield function(self, *part, *shared)

    @property
    def num_heads(self) -> int:
        return len(self.values)

    @property
    def num_clusters(self) -> Counts:
        """Number of clusters of each head (H,)."""
        return np.array([len(values) for values in self.values], dtype=np.int64)

    @property
    def offsets(self) -> Counts:
        """First head cluster of each head, and C: H+1 numbers."""
        return np.concatenate([[0], np.cumsum(self.num_clusters)]).astype(np.int64)

    @property
    def num_head_clusters(self) -> int:
        return int(self.num_clusters.sum())

    def image_parts(self) -> list[tuple[int, int]]:
        """(start, stop) of each part, for work that needs all heads of an image."""
        return ranges(self.num_images, max(1, PART_LABELS // self.num_heads))

    def head_parts(self) -> list[tuple[int, int, int, int]]:
        """(start, stop, first head, end of heads) of each part: few heads and many images, for work that makes tables
        with a column for each head cluster."""
        num_images = min(self.num_images, PART_LABELS)
        heads = ranges(self.num_heads, PART_LABELS // num_images)
        return [(*images, *some) for images in ranges(self.num_images, num_images) for some in heads]

    def gather(self, heads: slice = slice(None)) -> HeadLabels:
        """The whole matrix, or some of its rows, in this process."""
        parts = [(start, stop, *heads.indices(self.num_heads)[:2]) for start, stop in self.image_parts()]
        return HeadLabels(np.concatenate(list(self.map(_read_codes, parts)), axis=1), self.values[heads])

    def codes_of(self, head: int) -> Labels:
        """Clusters (N,) of the images by one head, numbered without gaps, -1 where a label is missing."""
        codes_N: Labels = self.gather(slice(head, head + 1)).codes[0]
        return codes_N

    def head_cluster_sizes(self) -> Counts:
        """Images of each head cluster (C,)."""
        sizes_C = np.zeros(self.num_head_clusters, dtype=np.int64)
        parts = self.head_parts()
        for (_, _, first, end), sizes in zip(parts, self.map(_count_codes, parts), strict=True):
            sizes_C[self.offsets[first] : self.offsets[end]] += sizes
        return sizes_C


@dataclass(frozen=True)
class HeadLabels(Heads):
    """Labels in memory: ``codes[h, i]`` (H, N) is the cluster 0..K_h-1 of image i by head h, or -1."""

    codes: Labels
    values: tuple[npt.NDArray[np.int64], ...]
    unlabelled: Images = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @property
    def num_images(self) -> int:
        return int(self.codes.shape[1])

    def read(self, start: int, stop: int, heads: slice = slice(None)) -> HeadLabels:
        return HeadLabels(self.codes[heads, start:stop], self.values[heads])

    def labels_of(self, head: int) -> Labels:
        codes_N: Labels = self.codes[head]
        return codes_N

    def select(self, heads: Sequence[int]) -> HeadLabels:
        return HeadLabels(self.codes[list(heads)], tuple(self.values[head] for head in heads), self.unlabelled)

    def columns(self) -> npt.NDArray[np.int64]:
        """Head clusters (N, H) of the images, -1 where a label is missing."""
        codes_NH = self.codes.T
        return np.where(codes_NH >= 0, codes_NH + self.offsets[:-1], MISSING)

    def votes(self, cluster_of_column: Labels) -> Labels:
        """Clusters (N, H) that the heads vote for, given the cluster that each head cluster votes for (C,); -1 where a
        label is missing."""
        columns_NH = self.columns()
        return np.where(columns_NH >= 0, cluster_of_column[columns_NH], np.int32(MISSING))


def ranges(total: int, step: int) -> list[tuple[int, int]]:
    """(start, stop) of the parts of a whole."""
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def _read_codes(heads: Heads, start: int, stop: int, first: int, end: int) -> Labels:
    return heads.read(start, stop, slice(first, end)).codes


def _count_codes(heads: Heads, start: int, stop: int, first: int, end: int) -> Counts:
    part = heads.read(start, stop, slice(first, end))
    return np.concatenate(
        [count_labels(codes_n, len(values)) for codes_n, values in zip(part.codes, part.values, strict=True)]
    )


def count_labels(labels_N: npt.NDArray[Any], num_clusters: int) -> Counts:
    """Images of each cluster (num_clusters,); missing labels are left out."""
    return np.bincount(labels_N[labels_N >= 0], minlength=num_clusters).astype(np.int64, copy=False)


class Survey(NamedTuple):
    """Summary of the labels of a part of the images."""

    values: tuple[npt.NDArray[np.int64], ...]
    """Labels that each head uses, ascending."""
    lowest: int
    unlabelled: Images
    """Images without a label from any head, ascending."""


def survey(matrix_Hn: npt.NDArray[Any], start: int = 0) -> Survey:
    """Survey the labels of the images from `start` on."""
    unlabelled = start + np.flatnonzero((matrix_Hn < 0).all(axis=0))
    used = [np.sort(pc.unique(pa.array(labels_n)).to_numpy()).astype(np.int64) for labels_n in matrix_Hn]
    return Survey(tuple(values[values >= 0] for values in used), int(matrix_Hn.min()), unlabelled)


def check_surveys(surveys: Sequence[Survey]) -> tuple[tuple[npt.NDArray[np.int64], ...], Images]:
    """The labels that each head uses, and the images that none labels, ascending, from the surveys of all parts in
    order. Raises InputError: a label below -1, or a head without any label."""
    lowest = min(part.lowest for part in surveys)
    if lowest < MISSING:
        raise InputError(f"the label matrix holds {lowest}; labels start at 0, and -1 means missing")
    values = tuple(np.unique(np.concatenate(of_head)) for of_head in zip(*(s.values for s in surveys), strict=True))
    for head, head_values in enumerate(values):
        if not len(head_values):
            raise InputError(f"head {head} has no label for any image (all are -1); leave it out")
    return values, np.concatenate([part.unlabelled for part in surveys])


def check_matrix(shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
    """Check that an array of this shape and type can be a label matrix. Raises InputError: not two-dimensional, empty,
    or not integers."""
    if len(shape) != 2:
        raise InputError(f"the label matrix has shape {shape}; it must be two-dimensional: (heads, images)")
    if not np.issubdtype(dtype, np.integer):
        raise InputError(f"the labels are {np.dtype(dtype)}; they must be integers (-1 where a label is missing)")
    if 0 in shape:
        raise InputError(f"the label matrix has shape {shape}; it needs at least one head and one image")


def encode_heads(labels_HN: npt.ArrayLike) -> HeadLabels:
    """Check a label matrix (H, N), -1 where a label is missing, and number the clusters of each head without gaps, in
    the order of their labels. Raises InputError: not two-dimensional, empty, not integers, a label below -1, or a head
    without any label."""
    matrix = np.asarray(labels_HN)
    check_matrix(matrix.shape, matrix.dtype)
    values, unlabelled = check_surveys([survey(matrix)])
    matrix = np.delete(matrix, unlabelled, axis=1)
    codes = [encode_labels(labels_N, head_values) for labels_N, head_values in zip(matrix, values, strict=True)]
    return HeadLabels(np.stack(codes), values, unlabelled)


def encode_labels(labels_n: npt.NDArray[Any], values: npt.NDArray[np.int64]) -> Labels:
    """Position of each label in `values`, which holds all of them, ascending; -1 stays -1."""
    largest = int(values[-1])
    if largest > 4 * len(values) + 1000:
        codes_n = np.searchsorted(values, labels_n).astype(np.int32)
        codes_n[labels_n < 0] = MISSING
        return codes_n
    code_of_label = np.full(largest + 2, MISSING, dtype=np.int32)  # the last one is for the missing label, -1
    code_of_label[values] = np.arange(len(values), dtype=np.int32)
    codes: Labels = code_of_label[labels_n]
    return codes


def count_consensus(labels_N: npt.NDArray[Any], heads: Heads, num_clusters: int) -> npt.NDArray[Any]:
    """Counts of a labelling against the clusters of all heads: (num_clusters, C) integers, additive over shards.

    They are int32 if the number of images allows it: this is the largest array of a consensus.
    """
    counts_KC = np.zeros((num_clusters, heads.num_head_clusters), dtype=_count_dtype(heads.num_images))
    offsets, parts = heads.offsets, heads.head_parts()
    tables = heads.map(_count_part, parts, labels_N, num_clusters)
    for (_, _, first, end), table in zip(parts, tables, strict=True):
        counts_KC[:, offsets[first] : offsets[end]] += table
    return counts_KC


def _count_part(
    heads: Heads, start: int, stop: int, first: int, end: int, labels_N: npt.NDArray[Any], num_clusters: int
) -> npt.NDArray[Any]:
    part = heads.read(start, stop, slice(first, end))
    table = np.empty((num_clusters, part.num_head_clusters), dtype=_count_dtype(heads.num_images))
    for codes_n, (begin, after) in zip(part.codes, pairwise(part.offsets), strict=True):
        cells_n = cell_numbers(labels_N[start:stop], codes_n, int(after - begin))
        counts = np.bincount(cells_n, minlength=num_clusters * int(after - begin))
        table[:, begin:after] = counts.reshape(num_clusters, -1)
    return table


def _count_dtype(num_images: int) -> type[np.integer[Any]]:
    return np.int32 if num_images < 2**31 else np.int64


def anmi(labels_N: npt.NDArray[Any], heads: Heads, num_clusters: int) -> float:
    """Average NMI (geometric) of a labelling (N,), 0..num_clusters-1, with every head, 0 to 1. An image without a label
    from a head is left out of that head's NMI."""
    return anmi_from_counts(count_consensus(labels_N, heads, num_clusters), heads.offsets)
