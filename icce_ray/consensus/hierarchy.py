"""The hierarchy of the clusters: those that the heads confuse most are merged first (docs/METHOD.md, "Hierarchy").

The similarity of two clusters is the chance that a head puts an image of each into the same head cluster, averaged over
the heads. It follows from the contingency counts of the consensus with the heads. These add up over the parts of the
images, so the tree does not depend on the parts. Merged clusters are compared by the mean over pairs of images (average
linkage, weighted by size).

Shape letters: K clusters, C head clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.consensus.best_merges import best_merges
from icce_ray.consensus.label_matrix import Counts
from icce_ray.errors import InputError

HIERARCHY_NAME = "hierarchy.parquet"


@dataclass(frozen=True)
class Hierarchy:
    """K - 1 merges, the most similar first. The clusters are 0..K-1; the merge of step s is number K + s."""

    left: npt.NDArray[np.int32]
    """(K-1,) the merged one with the lowest cluster in it."""
    right: npt.NDArray[np.int32]
    """(K-1,) the other one."""
    similarity: npt.NDArray[np.float64]
    """(K-1,) 0 to 1, never rising: chance that a head puts an image of each together."""
    size: Counts
    """(K-1,) number of images in both."""

    @property
    def num_clusters(self) -> int:
        return len(self.left) + 1

    def cut(self, num_groups: int) -> npt.NDArray[np.int32]:
        """Group of each cluster (K,) int32 if `num_groups` are left. Groups are numbered in the order of their lowest
        cluster. Raises InputError: `num_groups` is not 1..K."""
        if not 1 <= num_groups <= self.num_clusters:
            raise InputError(
                f"{num_groups} groups asked for; the hierarchy has {self.num_clusters} clusters: give a number from 1 "
                f"to {self.num_clusters}"
            )
        lowest = np.arange(2 * self.num_clusters - 1)
        holder_K = np.arange(self.num_clusters)
        for step in range(self.num_clusters - num_groups):
            ends = [lowest[self.left[step]], lowest[self.right[step]]]
            holder_K[np.isin(holder_K, ends)] = lowest[self.num_clusters + step] = min(ends)
        return np.unique(holder_K, return_inverse=True)[1].astype(np.int32)

    def renumbered(self, number_K: npt.NDArray[np.int32]) -> Hierarchy:
        """The same with other numbers of the clusters, a permutation of 0..K-1."""
        names = np.concatenate([number_K, np.arange(self.num_clusters, 2 * self.num_clusters - 1)])
        lowest = names.copy()
        ends = np.stack([self.left, self.right], axis=1)
        for step, pair in enumerate(ends):
            pair[:] = pair[np.argsort(lowest[pair])]
            lowest[self.num_clusters + step] = lowest[pair[0]]
        left, right = names[ends].T.astype(np.int32)
        return Hierarchy(left, right, self.similarity, self.size)

    def to_table(self) -> pa.Table:
        """One row for each merge: step, left, right, merged, similarity, size."""
        steps = np.arange(len(self.left), dtype=np.int32)
        return pa.table(
            {
                "step": steps,
                "left": self.left,
                "right": self.right,
                "merged": steps + np.int32(self.num_clusters),
                "similarity": self.similarity,
                "size": self.size,
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> Hierarchy:
        return cls(*(table[name].to_numpy() for name in ("left", "right", "similarity", "size")))


def build_hierarchy(counts_KC: npt.NDArray[Any], offsets: Counts) -> Hierarchy:
    """The hierarchy of the clusters of a consensus, from their images in each head cluster (K, C). `offsets`: the first
    head cluster of each head, and C."""
    return merge_clusters(similarities(counts_KC, offsets), _sizes(counts_KC, offsets))


def similarities(counts_KC: npt.NDArray[Any], offsets: Counts) -> npt.NDArray[np.float64]:
    """Similarity of every two clusters (K, K), 0 to 1: the chance that they share a head cluster, averaged over the
    heads; 0 if one is empty. The diagonal compares two draws from one cluster."""
    similarity_KK = np.zeros((len(counts_KC),) * 2)
    for start, stop in pairwise(offsets):  # one head at a time: the shares of all heads would take another K x C table
        counts_Kc = counts_KC[:, start:stop].astype(np.float64)
        shares_Kc = counts_Kc / np.maximum(counts_Kc.sum(axis=1, keepdims=True), 1)
        similarity_KK += shares_Kc @ shares_Kc.T
    return similarity_KK / max(len(offsets) - 1, 1)


def merge_clusters(similarity_KK: npt.NDArray[np.float64], sizes_K: Counts) -> Hierarchy:
    """Average linkage of clusters of `sizes_K` images each. (SciPy's starts from single points.) Among equal
    similarities, the pair with the lowest clusters is merged first; a group counts as its lowest cluster."""
    num_clusters = len(sizes_K)
    similarity = (similarity_KK + similarity_KK.T) / 2  # exactly symmetric
    sizes, names = sizes_K.astype(np.int64), np.arange(num_clusters, dtype=np.int32)
    left, right = np.empty((2, num_clusters - 1), dtype=np.int32)
    merged_at, merged_sizes = np.empty(num_clusters - 1), np.empty(num_clusters - 1, dtype=np.int64)

    def mean(low: int, high: int, others: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        share = sizes[low] / max(sizes[low] + sizes[high], 1)
        return np.asarray(share * similarity[low, others] + (1 - share) * similarity[high, others])

    for step, (low, high, value) in enumerate(best_merges(similarity, num_clusters - 1, mean)):
        left[step], right[step], merged_at[step] = names[low], names[high], value
        sizes[low] += sizes[high]
        merged_sizes[step], names[low] = sizes[low], num_clusters + step
    # Means of similarities do not rise, but rounding may make them rise.
    return Hierarchy(left, right, np.minimum.accumulate(merged_at), merged_sizes)


def _sizes(counts_KC: npt.NDArray[Any], offsets: Counts) -> Counts:
    """Images of each cluster (K,), as counted by the head that labels most of them."""
    by_head = [counts_KC[:, start:stop].sum(axis=1, dtype=np.int64) for start, stop in pairwise(offsets)]
    sizes_K: Counts = np.max(by_head, axis=0)
    return sizes_K
