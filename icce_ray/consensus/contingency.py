"""Contingency counts: how many images two label vectors put into each pair of clusters.

Everything the consensus needs to know about the images passes through such counts. They are sums over images, so those
of shards add up to those of the whole. A label of -1 means missing: the image is left out of that count.

Shape letters: N images, H heads, K clusters of the consensus, C head clusters (the clusters of all heads, head after
head, C = sum of K_h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from icce_ray.errors import InputError

Labels = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]

MISSING = -1
MAX_DENSE_CELLS_PER_IMAGE = 4
MIN_DENSE_CELLS = 1 << 20


@dataclass(frozen=True)
class HeadLabels:
    """The label matrix with the clusters of each head numbered without gaps.

    ``codes[h, i]`` (H, N) is the cluster 0..K_h-1 that head h gives image i, or -1. ``values[h][code]`` is the label
    that the caller used for it. ``offsets[h] + code`` numbers the head clusters of all heads, 0..C-1.
    """

    codes: Labels
    values: tuple[npt.NDArray[np.int64], ...]

    @property
    def num_heads(self) -> int:
        return int(self.codes.shape[0])

    @property
    def num_images(self) -> int:
        return int(self.codes.shape[1])

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
        return int(self.offsets[-1])

    def columns(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Head clusters (n, H) of the images start..stop-1, -1 where a head's label is missing."""
        codes_nH = self.codes[:, start:stop].T
        return np.where(codes_nH >= 0, codes_nH + self.offsets[:-1], MISSING)

    def head_cluster_sizes(self) -> Counts:
        """Images per head cluster (C,)."""
        sizes = [count_labels(codes_N, len(values)) for codes_N, values in zip(self.codes, self.values, strict=True)]
        return np.concatenate(sizes)


def encode_heads(labels_HN: npt.ArrayLike) -> HeadLabels:
    """Check a label matrix and number each head's clusters without gaps, in the order of their labels.

    Args:
        labels_HN: (H, N) integers; row h holds head h's cluster of each image, -1 where it gave none.

    Raises:
        InputError: not two-dimensional, empty, not integers, a label below -1, a head or an image without any label.
    """
    matrix = np.asarray(labels_HN)
    if matrix.ndim != 2:
        raise InputError(f"the label matrix has shape {matrix.shape}; it must be two-dimensional: (heads, images)")
    if not np.issubdtype(matrix.dtype, np.integer):
        raise InputError(f"the labels are {matrix.dtype}; they must be integers (-1 where a label is missing)")
    if 0 in matrix.shape:
        raise InputError(f"the label matrix has shape {matrix.shape}; it needs at least one head and one image")
    if np.issubdtype(matrix.dtype, np.signedinteger) and int(matrix.min()) < MISSING:
        raise InputError(f"the label matrix holds {int(matrix.min())}; labels start at 0, and -1 means missing")
    codes_HN = np.empty(matrix.shape, dtype=np.int32)
    values = []
    for head, labels_N in enumerate(matrix):
        codes_HN[head], head_values = _number_without_gaps(labels_N)
        if not len(head_values):
            raise InputError(f"head {head} has no label for any image (all are -1); leave it out")
        values.append(head_values)
    unlabelled = np.flatnonzero((codes_HN < 0).all(axis=0))
    if len(unlabelled):
        raise InputError(
            f"{len(unlabelled)} images have no label from any head (the first is image {unlabelled[0]}); leave them out"
        )
    return HeadLabels(codes_HN, tuple(values))


def _number_without_gaps(labels_N: npt.NDArray[Any]) -> tuple[Labels, npt.NDArray[np.int64]]:
    largest = int(labels_N.max())
    if largest > 4 * len(labels_N) + 1000:
        values = np.unique(labels_N)
        values = values[values >= 0] if values[0] < 0 else values
        codes_N = np.searchsorted(values, labels_N).astype(np.int32)
        codes_N[labels_N < 0] = MISSING
        return codes_N, values.astype(np.int64)
    is_used = np.zeros(largest + 2, dtype=bool)
    is_used[labels_N] = True  # the missing label, -1, marks the spare last place
    is_used[-1] = False
    code_of_label = np.where(is_used, np.cumsum(is_used) - 1, MISSING).astype(np.int32)
    return code_of_label[labels_N], np.flatnonzero(is_used)


def count_labels(labels_N: npt.NDArray[Any], num_clusters: int) -> Counts:
    """Images per cluster (num_clusters,); missing labels are left out."""
    return np.bincount(labels_N[labels_N >= 0], minlength=num_clusters).astype(np.int64, copy=False)


def count_pairs(a_N: npt.NDArray[Any], b_N: npt.NDArray[Any], num_a: int, num_b: int) -> sp.csr_array:
    """Contingency counts of two label vectors: cell (p, q) holds the images with label p in `a_N` and q in `b_N`.

    Args:
        a_N, b_N: (N,) integers 0..num-1, or -1 where missing: such an image is not counted.
        num_a, num_b: rows and columns of the result.

    Returns:
        (num_a, num_b) int64 without stored zeros. The counts of shards add up.
    """
    cells_n = _cells(a_N, b_N, num_b)
    if num_a * num_b <= max(MIN_DENSE_CELLS, MAX_DENSE_CELLS_PER_IMAGE * len(cells_n)):
        return sp.csr_array(np.bincount(cells_n, minlength=num_a * num_b).reshape(num_a, num_b))
    used_cells, counts = np.unique(cells_n, return_counts=True)
    rows, columns = np.divmod(used_cells, num_b)
    table = sp.coo_array((counts.astype(np.int64), (rows, columns)), shape=(num_a, num_b))
    return sp.csr_array(table)


def _cells(a_N: npt.NDArray[Any], b_N: npt.NDArray[Any], num_b: int) -> npt.NDArray[np.int64]:
    assert a_N.shape == b_N.shape
    present = (a_N >= 0) & (b_N >= 0)
    if not present.all():
        a_N, b_N = a_N[present], b_N[present]
    cells_n: npt.NDArray[np.int64] = a_N.astype(np.int64) * num_b + b_N
    return cells_n


def count_consensus(labels_N: npt.NDArray[Any], heads: HeadLabels, num_clusters: int) -> Counts:
    """Counts of a labelling against the clusters of all heads: (num_clusters, C) int64, additive over shards."""
    counts_KC = np.zeros((num_clusters, heads.num_head_clusters), dtype=np.int64)
    for codes_N, start, stop in zip(heads.codes, heads.offsets[:-1], heads.offsets[1:], strict=True):
        cells_n = _cells(labels_N, codes_N, int(stop - start))
        counts = np.bincount(cells_n, minlength=num_clusters * int(stop - start))
        counts_KC[:, start:stop] = counts.reshape(num_clusters, -1)
    return counts_KC
