"""Consensus without a partitioner: the best head as it is, and the majority of aligned heads. Also the repair of
clusters that a method left empty.

Shape letters: N images, H heads, C head clusters, K clusters of the consensus.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.agreement import align_heads
from icce_ray.consensus.contingency import MISSING, Counts, HeadLabels, Labels, count_consensus
from icce_ray.consensus.mcla import vote
from icce_ray.consensus.objective import anmi
from icce_ray.consensus.partition import PartitionError

MAX_ROUNDS = 20


def best_head(heads: HeadLabels, num_clusters: int, losses_H: npt.NDArray[np.float64] | None = None) -> Labels:
    """The labels (N,) of the head with the lowest loss, or without losses with the highest ANMI, with its own numbers
    where these lie in 0..num_clusters-1. Only heads that label every image and have at most that many clusters.

    Raises:
        PartitionError: there is no such head.
    """
    usable = [head for head in range(heads.num_heads) if _is_usable(heads, head, num_clusters)]
    if not usable:
        raise PartitionError(f"no head labels every image with at most {num_clusters} clusters")
    if losses_H is not None:
        head = min(usable, key=lambda h: (np.isnan(losses_H[h]), losses_H[h]))
    else:
        head = max(usable, key=lambda h: anmi(heads.codes[h], heads, num_clusters))
    values = heads.values[head]
    codes_N = heads.codes[head]
    labels_N: Labels = values[codes_N].astype(np.int32) if values[-1] < num_clusters else codes_N.copy()
    return labels_N


def _is_usable(heads: HeadLabels, head: int, num_clusters: int) -> bool:
    return len(heads.values[head]) <= num_clusters and bool((heads.codes[head] >= 0).all())


def align_and_vote(heads: HeadLabels, num_clusters: int, *, seed: int, num_starts: int = 1) -> list[Labels]:
    """Majority of the heads, aligned to one of them; then aligned to that majority, and so on until the ANMI stops
    rising: labels (N,) for each of `num_starts` heads, those with the highest ANMI among the ones that fit.

    A head with more than `num_clusters` clusters keeps its largest and joins the rest to the smallest of these.
    """
    clusters = heads.num_clusters
    fits = [bool(clusters[head] <= num_clusters) for head in range(heads.num_heads)]
    scores = [anmi(_as_start(heads, head, num_clusters), heads, num_clusters) for head in range(heads.num_heads)]
    order = sorted(range(heads.num_heads), key=lambda head: (not fits[head], -scores[head]))
    starts = [_as_start(heads, head, num_clusters) for head in order[:num_starts]]
    return [_vote_until_stable(labels_N, heads, num_clusters, seed) for labels_N in starts]


def _vote_until_stable(labels_N: Labels, heads: HeadLabels, num_clusters: int, seed: int) -> Labels:
    best_N, best = labels_N, -1.0
    for _ in range(MAX_ROUNDS):
        cluster_of_column = align_heads(count_consensus(labels_N, heads, num_clusters), heads.offsets)
        labels_N = vote(heads, cluster_of_column, num_clusters, seed=seed, by_mean=False)
        labels_N = fill_empty_clusters(labels_N, heads, num_clusters)
        value = anmi(labels_N, heads, num_clusters)
        if value <= best:
            break
        best_N, best = labels_N, value
    return best_N


def _as_start(heads: HeadLabels, head: int, num_clusters: int) -> Labels:
    """The head's labels in 0..num_clusters-1, none missing."""
    codes_N = heads.codes[head]
    if len(heads.values[head]) > num_clusters:
        order = np.argsort(-np.bincount(codes_N[codes_N >= 0]), kind="stable")
        rank = np.empty(len(order), dtype=np.int32)
        rank[order] = np.arange(len(order))
        codes_N = np.where(codes_N >= 0, np.minimum(rank[codes_N], num_clusters - 1), MISSING)
    labels_N: Labels = np.where(codes_N >= 0, codes_N, num_clusters - 1).astype(np.int32)
    return labels_N


def fill_empty_clusters(labels_N: Labels, heads: HeadLabels, num_clusters: int) -> Labels:
    """The labels (N,) with every cluster 0..num_clusters-1 used, if enough images differ in their labels.

    An empty cluster gets the largest group of images that one head tells apart from the rest of their cluster: the
    second largest cell of a cluster's row in the counts against a head.
    """
    counts_KC = count_consensus(labels_N, heads, num_clusters)
    sizes_K = np.bincount(labels_N, minlength=num_clusters)
    empty = list(np.flatnonzero(sizes_K == 0))
    if not empty:
        return labels_N
    labels_N = labels_N.copy()
    splits = [_largest_split(counts_C, heads.offsets) for counts_C in counts_KC]
    for target in empty:
        source = max(range(num_clusters), key=lambda cluster: splits[cluster][0])
        size, head, code = splits[source]
        if size == 0:
            break
        moved = np.flatnonzero((labels_N == source) & (heads.codes[head] == code))
        labels_N[moved] = target
        shard = HeadLabels(heads.codes[:, moved], heads.values)
        counts_C = count_consensus(np.zeros(len(moved), dtype=np.int32), shard, 1)[0]
        counts_KC[target] += counts_C
        counts_KC[source] -= counts_C
        for cluster in (source, target):
            splits[cluster] = _largest_split(counts_KC[cluster], heads.offsets)
    return labels_N


def _largest_split(counts_C: Counts, offsets: Counts) -> tuple[int, int, int]:
    """Images in the second largest cell of one head, that head, and its cluster; 0 images where no head splits it."""
    best = (0, 0, 0)
    for head, (start, stop) in enumerate(pairwise(offsets)):
        if stop - start >= 2:
            code = int(np.argsort(-counts_C[start:stop], kind="stable")[1])
            best = max(best, (int(counts_C[start + code]), head, code))
    return best
