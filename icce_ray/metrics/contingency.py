"""Contingency counts: how many images two labellings put into each pair of clusters, and what follows from them:
normalised mutual information (docs/METHOD.md, "Objective"), which clusters are the same, and whether clusterings agree
about sizes, which are then a property of the images (docs/METHOD.md, "Balance").

Counts are sums over images, so the counts of shards add up to those of the whole. An image without a label (-1) in
either labelling is not counted. The NMI of Strehl & Ghosh (JMLR 3:583-617, 2002) is the mutual information divided by
the geometric mean of the two entropies. Entropies are in nats.

Shape letters: N images, n images that have both labels.
"""

from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment

Table: TypeAlias = sp.csr_array | npt.NDArray[Any]

MAX_DENSE_CELLS_PER_IMAGE = 4
MIN_DENSE_CELLS = 1 << 20
Mean = Literal["geometric", "arithmetic"]
MIN_SHARE = 0.5
"""Smallest share of an old cluster's images in the new one that it is taken for."""
MIN_SIZE_AGREEMENT = 0.3
"""Below this, different sizes are taken for accidents of each clustering."""
MAX_SIZED_IMAGES = 4096
"""Number of images whose clusters' sizes are compared, if there are more."""


def count_table(a_N: npt.NDArray[Any], b_N: npt.NDArray[Any], num_a: int, num_b: int) -> Table:
    """Contingency table of two labellings (N,), -1 where missing: cell (p, q) counts the images with label p in `a_N`
    and q in `b_N`. Returns (num_a, num_b) int64: an array, or a sparse array without stored zeros where an array would
    be far larger than the labels."""
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


def entropy(sizes: npt.NDArray[Any]) -> float:
    """Entropy in nats of the distribution given by the counts `sizes`; 0 if there are none."""
    counts = sizes[sizes > 0].astype(np.float64)
    total = counts.sum()
    return max(float(np.log(total) - (counts * np.log(counts)).sum() / total), 0.0) if len(counts) > 1 else 0.0


def as_array(table: Table) -> npt.NDArray[Any]:
    """A contingency table without its sparse form."""
    return table if isinstance(table, np.ndarray) else table.toarray()


def mutual_information(table: Table) -> float:
    """Mutual information in nats between the rows and columns of a contingency table, never negative."""
    total = int(table.sum())
    if total == 0:
        return 0.0
    cells = table.ravel() if isinstance(table, np.ndarray) else table.data
    rows, columns = (np.asarray(table.sum(axis=axis)).ravel() for axis in (1, 0))
    surprise = _x_log_x(cells) - _x_log_x(rows) - _x_log_x(columns) + total * float(np.log(total))
    return max(surprise / total, 0.0)


def _x_log_x(counts: npt.NDArray[Any]) -> float:
    """Sum of x log x. Counts of 1 add nothing, and most counts of a large table are 1."""
    values = counts[counts > 1].astype(np.float64)
    return float((values * np.log(values)).sum())


def nmi_from_counts(table: Table, mean: Mean = "geometric") -> float:
    """Normalised mutual information of a contingency table, 0 to 1.

    As in scikit-learn, two labellings with a single cluster each agree (1). If only one of them has a single cluster,
    it says nothing about the other (0).
    """
    row_sizes = np.asarray(table.sum(axis=1)).ravel()
    column_sizes = np.asarray(table.sum(axis=0)).ravel()
    if np.count_nonzero(row_sizes) <= 1 and np.count_nonzero(column_sizes) <= 1:
        return 1.0
    entropies = entropy(row_sizes), entropy(column_sizes)
    if min(entropies) == 0.0:
        return 0.0
    norm = float(np.sqrt(entropies[0] * entropies[1])) if mean == "geometric" else sum(entropies) / 2
    return min(mutual_information(table) / norm, 1.0)


def anmi_from_counts(counts_KC: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> float:
    """Average NMI (geometric) of a labelling with several others, 0 to 1, from its contingency tables with each of
    them, side by side (K, C). `offsets`: the first column of each table, and C."""
    return float(np.mean([nmi_from_counts(counts_KC[:, start:stop]) for start, stop in pairwise(offsets)]))


def match_clusters(table_KL: npt.NDArray[Any]) -> dict[int, int]:
    """The new cluster of each old one that persists, from the images of each old cluster (K) in each new one (L):
    matched one to one so that most images agree (Kuhn, Naval Research Logistics 2, 1955); a match counts if it holds at
    least MIN_SHARE of the old cluster."""
    return {
        int(old): int(new)
        for old, new in zip(*linear_sum_assignment(-table_KL), strict=True)
        if 0 < table_KL[old, new] >= MIN_SHARE * table_KL[old].sum()
    }


def largest_share(table_KL: npt.NDArray[Any], sizes_K: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """For each row the column with most of its images, and whether that has at least MIN_SHARE of `sizes_K`."""
    most_K = table_KL.argmax(axis=1)
    counts_K = table_KL[np.arange(len(table_KL)), most_K]
    return most_K, (counts_K > 0) & (counts_K >= MIN_SHARE * sizes_K)


def size_agreement(labels_HN: npt.NDArray[np.integer[Any]]) -> float:
    """How far H clusterings agree which of N images lie in large clusters, -1 to 1: the mean over pairs of the
    correlation of the logarithms of the sizes of the images' clusters. One with equal clusters counts 0. 1 for a single
    one."""
    num_heads = len(labels_HN)
    if num_heads == 1:
        return 1.0
    counted = [np.unique(labels_N, return_inverse=True, return_counts=True) for labels_N in labels_HN]
    logs_HN = np.stack([np.log(sizes_K)[clusters_N] for _, clusters_N, sizes_K in counted])
    logs_HN -= logs_HN.mean(axis=1, keepdims=True)
    norm_H1 = np.linalg.norm(logs_HN, axis=1, keepdims=True)
    unit_HN = np.divide(logs_HN, norm_H1, out=np.zeros_like(logs_HN), where=norm_H1 > 1e-9)
    products = (unit_HN.sum(axis=0) ** 2).sum() - (unit_HN**2).sum()
    # Rounded, since workers on other processors may compute the last bits differently, and all must decide alike.
    return round(float(products) / (num_heads * (num_heads - 1)), 6)
