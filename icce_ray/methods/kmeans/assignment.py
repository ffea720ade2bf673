"""The nearest centroid of each row, and the sums of the rows of each cluster, on a CPU.

The product of the rows with the centroids is numpy's. On the machine this was written on, FAISS's assignment takes
four times as long.

Legend: n rows, d dimensions, K clusters, U clusters that some row is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from icce_ray.methods.kmeans.projection import Doubles, Floats

Labels = npt.NDArray[np.int32]

SCORES_AT_A_TIME = 2**20


@dataclass
class Sums:
    """Sum and number of the rows of each cluster. The rows lie on a grid, so sums are exact and can be added in any
    order (docs/METHOD.md, "K-means")."""

    rows_Kd: Doubles
    counts_K: npt.NDArray[np.int64]

    @classmethod
    def zeros(cls, num_clusters: int, dim: int) -> Sums:
        return cls(np.zeros((num_clusters, dim)), np.zeros(num_clusters, np.int64))

    @classmethod
    def join(cls, parts: Sequence[Sums]) -> Sums:
        total = cls(parts[0].rows_Kd.copy(), parts[0].counts_K.copy())
        for part in parts[1:]:
            total.rows_Kd += part.rows_Kd
            total.counts_K += part.counts_K
        return total

    def add(self, rows_nd: Floats, labels_n: Labels) -> None:
        used_U, place_n, counts_U = np.unique(labels_n, return_inverse=True, return_counts=True)
        size = len(rows_nd)
        member_Un = sp.csc_array((np.ones(size), place_n, np.arange(size + 1)), shape=(len(used_U), size))
        self.rows_Kd[used_U] += member_Un @ rows_nd.astype(np.float64)
        self.counts_K[used_U] += counts_U


def nearest(rows_nd: Floats, centroids_Kd: Floats) -> Labels:
    """The nearest centroid of each row (n,); of equally near ones the lowest number."""
    half_K = np.einsum("kd,kd->k", centroids_Kd, centroids_Kd, dtype=np.float64).astype(np.float32) / 2
    labels_n = np.empty(len(rows_nd), np.int32)
    step = max(1, SCORES_AT_A_TIME // len(centroids_Kd))
    for start in range(0, len(rows_nd), step):
        scores_sK = rows_nd[start : start + step] @ centroids_Kd.T
        scores_sK -= half_K
        labels_n[start : start + step] = scores_sK.argmax(axis=1)
    return labels_n


def squared_distances(rows_nd: Floats, centroids_Kd: Floats, labels_n: Labels) -> Doubles:
    """Squared distance of each row from the centroid of its cluster (n,), in float64."""
    difference_nd = rows_nd.astype(np.float64) - centroids_Kd[labels_n]
    distances_n: Doubles = np.einsum("nd,nd->n", difference_nd, difference_nd)
    return distances_n
