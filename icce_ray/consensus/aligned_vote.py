"""Consensus without a partitioner: the best head as it is, and the majority of aligned heads. Also the repair of
clusters that a method left empty.

Shape letters: N images, H heads, C head clusters, K clusters of the consensus.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.agreement import align_heads
from icce_ray.consensus.cluster_counts import count_consensus
from icce_ray.consensus.label_matrix import MISSING, Counts, Heads, Labels
from icce_ray.consensus.mcla import vote
from icce_ray.consensus.partition import PartitionError
from icce_ray.metrics.nmi import anmi_from_counts

MAX_ROUNDS = 20


def best_head(heads: Heads, num_clusters: int, *, scores_H: npt.NDArray[np.float64]) -> Labels:
    """The labels (N,) of the head with the highest score (NaN is lowest), with its own numbers where these lie in
    0..num_clusters-1. Only heads that label every image and have at most that many clusters.

    Raises:
        PartitionError: there is no such head.
    """
    sizes_C = heads.head_cluster_sizes()
    labelled_H = np.array([sizes_C[start:stop].sum() for start, stop in pairwise(heads.offsets)])
    usable = np.flatnonzero((heads.num_clusters <= num_clusters) & (labelled_H == heads.num_images))
    if not len(usable):
        raise PartitionError(f"no head labels every image with at most {num_clusters} clusters")
    head = int(usable[np.where(np.isnan(scores_H[usable]), -np.inf, scores_H[usable]).argmax()])
    values = heads.values[head]
    codes_N = heads.gather(slice(head, head + 1)).codes[0]
    labels_N: Labels = values[codes_N].astype(np.int32) if values[-1] < num_clusters else codes_N
    return labels_N


def align_and_vote(
    heads: Heads, num_clusters: int, *, scores_H: npt.NDArray[np.float64], seed: int, num_starts: int = 1
) -> list[Labels]:
    """Majority of the heads, aligned to one of them; then aligned to that majority, and so on until the ANMI stops
    rising: labels (N,) for each of `num_starts` heads, those with the highest score among the ones that fit.

    A head with more than `num_clusters` clusters keeps its largest and joins the rest to the smallest of these.
    """
    fits_H = heads.num_clusters <= num_clusters
    order = np.lexsort((-scores_H, ~fits_H))
    starts = (_as_start(heads, int(head), num_clusters) for head in order[:num_starts])
    return [_vote_until_stable(labels_N, heads, num_clusters, seed) for labels_N in starts]


def _vote_until_stable(labels_N: Labels, heads: Heads, num_clusters: int, seed: int) -> Labels:
    best_N, best = labels_N, -1.0
    counts_KC = count_consensus(labels_N, heads, num_clusters)
    for _ in range(MAX_ROUNDS):
        cluster_of_column = align_heads(counts_KC, heads.offsets)
        labels_N = vote(heads, cluster_of_column, num_clusters, seed=seed, by_mean=False)
        labels_N, _ = fill_empty_clusters(labels_N, heads, num_clusters)
        counts_KC = count_consensus(labels_N, heads, num_clusters)
        value = anmi_from_counts(counts_KC, heads.offsets)
        if value <= best:
            break
        best_N, best = labels_N, value
    return best_N


def _as_start(heads: Heads, head: int, num_clusters: int) -> Labels:
    """The head's labels in 0..num_clusters-1, none missing."""
    codes_N = heads.gather(slice(head, head + 1)).codes[0]
    if len(heads.values[head]) > num_clusters:
        order = np.argsort(-np.bincount(codes_N[codes_N >= 0]), kind="stable")
        rank = np.empty(len(order), dtype=np.int32)
        rank[order] = np.arange(len(order))
        codes_N = np.where(codes_N >= 0, np.minimum(rank[codes_N], num_clusters - 1), MISSING)
    labels_N: Labels = np.where(codes_N >= 0, codes_N, num_clusters - 1).astype(np.int32)
    return labels_N


def fill_empty_clusters(labels_N: Labels, heads: Heads, num_clusters: int) -> tuple[Labels, int]:
    """The labels (N,) with every cluster 0..num_clusters-1 used, if enough images differ in their labels, and how many
    clusters were empty.

    An empty cluster gets the largest group of images that one head tells apart from the rest of their cluster: the
    second largest cell of a cluster's row in the counts against a head.
    """
    empty = np.flatnonzero(np.bincount(labels_N, minlength=num_clusters) == 0)
    if not len(empty):
        return labels_N, 0
    counts_KC = count_consensus(labels_N, heads, num_clusters)
    labels_N = labels_N.copy()
    splits = [_largest_split(counts_C, heads.offsets) for counts_C in counts_KC]
    for target in empty:
        source = max(range(num_clusters), key=lambda cluster: splits[cluster][0])
        size, head, code = splits[source]
        if size == 0:
            break
        for moved, counts_C in heads.map(_split_piece, heads.image_pieces(), labels_N, source, head, code):
            labels_N[moved] = target
            counts_KC[target] += counts_C
            counts_KC[source] -= counts_C
        for cluster in (source, target):
            splits[cluster] = _largest_split(counts_KC[cluster], heads.offsets)
    return labels_N, len(empty)


def _split_piece(
    heads: Heads, start: int, stop: int, labels_N: Labels, source: int, head: int, code: int
) -> tuple[npt.NDArray[np.int64], Counts]:
    """Images that `head` puts into its cluster `code` among those of the consensus cluster `source`, and their counts
    against the head clusters (C,)."""
    part = heads.read(start, stop)
    moved_n = np.flatnonzero((labels_N[start:stop] == source) & (part.codes[head] == code))
    codes_Hn = part.codes[:, moved_n]
    columns = (codes_Hn + heads.offsets[:-1, None])[codes_Hn >= 0]
    return start + moved_n, np.bincount(columns, minlength=heads.num_head_clusters)


def _largest_split(counts_C: npt.NDArray[Any], offsets: Counts) -> tuple[int, int, int]:
    """Images in the second largest cell of one head, that head, and its cluster; 0 images where no head splits it."""
    best = (0, 0, 0)
    for head, (start, stop) in enumerate(pairwise(offsets)):
        if stop - start >= 2:
            code = int(np.argsort(-counts_C[start:stop], kind="stable")[1])
            best = max(best, (int(counts_C[start + code]), head, code))
    return best
