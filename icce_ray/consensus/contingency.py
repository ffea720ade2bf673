"""Contingency counts: how many images two labellings put into each pair of clusters.

Everything the consensus needs to know about the images passes through such counts. They are sums over images, so those
of shards add up to those of the whole. Where a label is missing (-1) the image is left out of that count.

Shape letters: N images, n of a piece, H heads, K clusters of the consensus, C head clusters.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from icce_ray.consensus.label_matrix import Heads

Table: TypeAlias = sp.csr_array | npt.NDArray[Any]

MAX_DENSE_CELLS_PER_IMAGE = 4
MIN_DENSE_CELLS = 1 << 20


def count_table(a_N: npt.NDArray[Any], b_N: npt.NDArray[Any], num_a: int, num_b: int) -> Table:
    """Contingency counts of two label vectors: cell (p, q) holds the images with label p in `a_N` and q in `b_N`.

    Args:
        a_N, b_N: (N,) integers 0..num-1, or -1 where missing: such an image is not counted.
        num_a, num_b: rows and columns of the result.

    Returns:
        (num_a, num_b) int64: an array, or where that would be far larger than the labels a sparse one without stored
        zeros. The counts of shards add up.
    """
    cells_n = _cells(a_N, b_N, num_b)
    if num_a * num_b <= max(MIN_DENSE_CELLS, MAX_DENSE_CELLS_PER_IMAGE * len(a_N)):
        return np.bincount(cells_n, minlength=num_a * num_b).reshape(num_a, num_b)
    used_cells, counts = np.unique(cells_n, return_counts=True)
    rows, columns = np.divmod(used_cells, num_b)
    table = sp.coo_array((counts.astype(np.int64), (rows, columns)), shape=(num_a, num_b))
    return sp.csr_array(table)


def count_pairs(a_N: npt.NDArray[Any], b_N: npt.NDArray[Any], num_a: int, num_b: int) -> sp.csr_array:
    """The counts of :func:`count_table`, always sparse."""
    return sp.csr_array(count_table(a_N, b_N, num_a, num_b))


def _cells(a_N: npt.NDArray[Any], b_N: npt.NDArray[Any], num_b: int) -> npt.NDArray[np.int64]:
    assert a_N.shape == b_N.shape
    if min(a_N.min(initial=0), b_N.min(initial=0)) < 0:
        present = (a_N >= 0) & (b_N >= 0)
        a_N, b_N = a_N[present], b_N[present]
    cells_n: npt.NDArray[np.int64] = a_N.astype(np.int64)
    cells_n *= num_b
    cells_n += b_N
    return cells_n


def count_consensus(labels_N: npt.NDArray[Any], heads: Heads, num_clusters: int) -> npt.NDArray[Any]:
    """Counts of a labelling against the clusters of all heads: (num_clusters, C) integers, additive over shards.

    They are int32 where the number of images allows: the largest thing that a consensus holds.
    """
    counts_KC = np.zeros((num_clusters, heads.num_head_clusters), dtype=count_dtype(heads.num_images))
    offsets, pieces = heads.offsets, heads.head_pieces()
    tables = heads.map(_count_piece, pieces, labels_N, num_clusters)
    for (_, _, first, end), table in zip(pieces, tables, strict=True):
        counts_KC[:, offsets[first] : offsets[end]] += table
    return counts_KC


def _count_piece(
    heads: Heads, start: int, stop: int, first: int, end: int, labels_N: npt.NDArray[Any], num_clusters: int
) -> npt.NDArray[Any]:
    part = heads.read(start, stop, slice(first, end))
    offsets = part.offsets
    table = np.empty((num_clusters, part.num_head_clusters), dtype=count_dtype(heads.num_images))
    for codes_n, (begin, after) in zip(part.codes, pairwise(offsets), strict=True):
        cells_n = _cells(labels_N[start:stop], codes_n, int(after - begin))
        counts = np.bincount(cells_n, minlength=num_clusters * int(after - begin))
        table[:, begin:after] = counts.reshape(num_clusters, -1)
    return table


def largest_rows(counts_KC: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Row of the largest count of each column (C,), the first of equal ones: argmax over the first axis, which numpy
    does ten times slower on a wide table."""
    largest_C, row_C = counts_KC[0].copy(), np.zeros(counts_KC.shape[1], dtype=np.int32)
    for row, counts_C in enumerate(counts_KC[1:], start=1):
        is_larger = counts_C > largest_C
        np.copyto(largest_C, counts_C, where=is_larger)
        np.copyto(row_C, np.int32(row), where=is_larger)
    return row_C


def count_dtype(num_images: int) -> type[np.integer[Any]]:
    return np.int32 if num_images < 2**31 else np.int64
