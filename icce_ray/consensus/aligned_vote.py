"""The consensus functions that need no partitioner: the majority of the heads after they are aligned to one another
(docs/METHOD.md, "Aligned vote"), and the best head, unchanged.

Shape letters: N images, H heads, C head clusters, K clusters of the consensus.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from icce_ray.consensus.empty_clusters import fill_empty_clusters
from icce_ray.consensus.label_matrix import MISSING, Counts, Heads, Labels, count_consensus
from icce_ray.consensus.partition import PartitionError
from icce_ray.consensus.votes import vote
from icce_ray.metrics.contingency import anmi_from_counts

MAX_ROUNDS = 20


def align_heads(counts_KC: npt.NDArray[Any], offsets: Counts) -> Labels:
    """Consensus cluster that each head cluster stands for (C,).

    A head with as many clusters as the consensus is matched one to one so that most images agree (Hungarian). Each
    cluster of any other head stands for the consensus cluster that holds most of its images.
    """
    num_clusters = len(counts_KC)
    cluster_of_column: Labels = counts_KC.argmax(axis=0).astype(np.int32)
    for start, stop in pairwise(offsets):
        if stop - start == num_clusters:
            rows, columns = linear_sum_assignment(counts_KC[:, start:stop], maximize=True)
            cluster_of_column[start + columns] = rows
    return cluster_of_column


def align_and_vote(
    heads: Heads, num_clusters: int, *, scores_H: npt.NDArray[np.float64], seed: int, num_starts: int = 1
) -> list[Labels]:
    """Consensus labels (N,) from each of `num_starts` heads: those with the highest score, heads with at most
    `num_clusters` clusters first.

    All heads are aligned to the start and vote, then to the result, and so on until the ANMI stops rising.
    """
    order = np.lexsort((-scores_H, heads.num_clusters > num_clusters))
    starts = (_labels_of_head(heads, int(head), num_clusters) for head in order[:num_starts])
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


def _labels_of_head(heads: Heads, head: int, num_clusters: int) -> Labels:
    """The head's labels as a start, 0..num_clusters-1. If it has more clusters, the smallest ones become the last;
    images without a label go there too."""
    codes_N = heads.codes_of(head)
    if len(heads.values[head]) > num_clusters:
        order = np.argsort(-np.bincount(codes_N[codes_N >= 0]), kind="stable")
        rank = np.empty(len(order), dtype=np.int32)
        rank[order] = np.arange(len(order))
        codes_N = np.where(codes_N >= 0, np.minimum(rank[codes_N], num_clusters - 1), MISSING)
    labels_N: Labels = np.where(codes_N >= 0, codes_N, num_clusters - 1).astype(np.int32)
    return labels_N


def best_head(heads: Heads, num_clusters: int, *, scores_H: npt.NDArray[np.float64]) -> Labels:
    """The labels (N,) of the head with the highest score (NaN is the lowest), in its own numbers if these are
    0..num_clusters-1. Only heads that label every image and have at most that many clusters are considered. Raises
    PartitionError: there is no such head."""
    labelled_H = np.add.reduceat(heads.head_cluster_sizes(), heads.offsets[:-1])
    usable = np.flatnonzero((heads.num_clusters <= num_clusters) & (labelled_H == heads.num_images))
    if not len(usable):
        raise PartitionError(f"no head labels every image with at most {num_clusters} clusters")
    head = int(usable[np.where(np.isnan(scores_H[usable]), -np.inf, scores_H[usable]).argmax()])
    values, codes_N = heads.values[head], heads.codes_of(head)
    labels_N: Labels = values[codes_N].astype(np.int32) if values[-1] < num_clusters else codes_N
    return labels_N
