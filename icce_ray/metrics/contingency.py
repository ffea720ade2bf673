"""Contingency counts: how many images two labellings put into each pair of clusters.

Counts are sums over images, so the counts of shards add up to those of the whole. An image without a label (-1) in
either labelling is not counted.

Shape letters: N images, n images that have both labels.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

Table: TypeAlias = sp.csr_array | npt.NDArray[Any]

MAX_DENSE_CELLS_PER_IMAGE = 4
MIN_DENSE_CELLS = 1 << 20


def count_table(a_N: npt.NDArray[Any], b_N: npt.NDArray[Any], num_a: int, num_b: int) -> Table:
    """Contingency table of two labellings: cell (p, q) counts the images with label p in `a_N` and q in `b_N`.

    Args:
        a_N, b_N: (N,) integers 0..num-1, or -1 where missing.
        num_a, num_b: number of rows and of columns of the table.

    Returns:
        (num_a, num_b) int64: an array, or a sparse array without stored zeros where an array would be far larger than
        the labels.
    """
    cells_n = cell_numbers(a_N, b_N, num_b)
    if num_a * num_b <= max(MIN_DENSE_CELLS, MAX_DENSE_CELLS_PER_IMAGE * len(a_N)):
        return np.bincount(cells_n, minlength=num_a * num_b).reshape(num_a, num_b)
    used_cells, counts = np.unique(cells_n, return_counts=True)
    rows, columns = np.divmod(used_cells, num_b)
    return sp.csr_array(sp.coo_array((counts.astype(np.int64), (rows, columns)), shape=(num_a, num_b)))


def cell_numbers(a_N: npt.NDArray[Any], b_N: npt.NDArray[Any], num_b: int) -> npt.NDArray[np.int64]:
    """Cell ``a * num_b + b`` of each image that has both labels (n,)."""
    assert a_N.shape == b_N.shape
    if min(a_N.min(initial=0), b_N.min(initial=0)) < 0:
        present = (a_N >= 0) & (b_N >= 0)
        a_N, b_N = a_N[present], b_N[present]
    cells_n: npt.NDArray[np.int64] = a_N.astype(np.int64)
    cells_n *= num_b
    cells_n += b_N
    return cells_n
