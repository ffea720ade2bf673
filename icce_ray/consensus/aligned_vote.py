"""Votes of the heads for clusters, and the consensus functions that need no partitioner: the majority of the heads
after they are aligned to one another (docs/METHOD.md, "Aligned vote"), and the best head, unchanged. Also the agreement
of aligned heads with a consensus, per image (docs/METHOD.md, "Agreement").

There is no array of images times clusters. Ties are broken by a hash of the image's votes, the cluster and the seed, so
the result depends neither on the parts nor on the order of the images, and images with equal votes stay together.

Shape letters: N images, n images of a part, H heads, R ranks, C head clusters, K clusters of the consensus.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment

from icce_ray.consensus.empty_clusters import fill_empty_clusters
from icce_ray.consensus.label_matrix import MISSING, Counts, Heads, Labels, count_consensus, count_labels, hash_numbers
from icce_ray.consensus.partition import PartitionError
from icce_ray.metrics.contingency import anmi_from_counts, count_table

MAX_ROUNDS = 20

Floats = npt.NDArray[np.float64]
MAX_CONFUSED_WITH = 3
ARRAYS = ("agreement", "vote_entropy", "second_choice")
"""Names of the fields of :class:`Agreement` in the artifact of a consensus."""


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
    heads: Heads, num_clusters: int, *, scores_H: Floats, seed: int, num_starts: int = 1
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


def best_head(heads: Heads, num_clusters: int, *, scores_H: Floats) -> Labels:
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


class Agreement(NamedTuple):
    """Votes of the heads for each image, after they are aligned to the consensus."""

    agreement_N: npt.NDArray[np.float32]
    """Share of the heads with a label whose aligned label is the consensus."""
    vote_entropy_N: npt.NDArray[np.float32]
    """Entropy of the aligned labels, in nats."""
    second_choice_N: Labels
    """The cluster with the most votes besides the consensus; -1 if no head votes for another."""


def measure_agreement(labels_N: Labels, heads: Heads, counts_KC: npt.NDArray[Any], *, seed: int) -> Agreement:
    """Agreement of the heads with a consensus (N,), 0..K-1, which has the counts `counts_KC` against the head
    clusters."""
    cluster_of_column = align_heads(counts_KC, heads.offsets)
    parts = heads.map(_measure_part, heads.image_parts(), labels_N, cluster_of_column, seed)
    return Agreement(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _measure_part(
    heads: Heads, start: int, stop: int, labels_N: Labels, cluster_of_column: Labels, seed: int
) -> Agreement:
    votes_nH, own_n = heads.read(start, stop).votes(cluster_of_column), labels_N[start:stop]
    agreement_n = (votes_nH == own_n[:, None]).sum(axis=1) / (votes_nH >= 0).sum(axis=1)
    ranked_n2, _, entropy_n = rank_votes(votes_nH, 2, seed=seed)
    second_n = np.where(ranked_n2[:, 0] == own_n, ranked_n2[:, 1], ranked_n2[:, 0])
    return Agreement(agreement_n.astype(np.float32), entropy_n.astype(np.float32), second_n)


def mean_agreements(labels_N: Labels, agreement_N: npt.NDArray[Any], num_clusters: int) -> Floats:
    """Mean agreement of the images of each cluster (K,), 0 for an empty one."""
    labelled = labels_N >= 0
    sums_K = np.bincount(labels_N[labelled], weights=agreement_N[labelled], minlength=num_clusters)
    means_K: Floats = sums_K / np.maximum(count_labels(labels_N, num_clusters), 1)
    return means_K


def describe_clusters(
    labels_N: Labels, agreement_N: npt.NDArray[np.float32], second_choice_N: Labels, num_clusters: int
) -> list[dict[str, Any]]:
    """Each cluster, JSON-able: `cluster`, `size` in images, `mean_agreement` (None if it is empty), and
    `confused_with`: the clusters that are most often the second choice of its images, with the share of its images."""
    sizes_K = count_labels(labels_N, num_clusters)
    agreement_K = mean_agreements(labels_N, agreement_N, num_clusters)
    seconds = sp.csr_array(count_table(labels_N, second_choice_N, num_clusters, num_clusters))
    described = []
    for cluster, (size, agreement) in enumerate(zip(sizes_K.tolist(), agreement_K.tolist(), strict=True)):
        begin, end = seconds.indptr[cluster], seconds.indptr[cluster + 1]
        others, counts = seconds.indices[begin:end], seconds.data[begin:end]
        most = np.lexsort((others, -counts))[:MAX_CONFUSED_WITH]
        confused = [{"cluster": int(others[i]), "share": float(counts[i] / size)} for i in most]
        mean_agreement = agreement if size else None
        described.append(
            {"cluster": cluster, "size": size, "mean_agreement": mean_agreement, "confused_with": confused}
        )
    return described


def vote(heads: Heads, cluster_of_column: npt.NDArray[Any], num_clusters: int, *, seed: int, by_mean: bool) -> Labels:
    """Winning cluster of each image: (N,) int32. Each head cluster votes for `cluster_of_column` (C,). `by_mean`: the
    votes for a cluster are divided by the number of head clusters that vote for it."""
    members_K = np.bincount(cluster_of_column, minlength=num_clusters)
    weights_K = 1.0 / np.maximum(members_K, 1) if by_mean else None
    parts = heads.map(_vote_part, heads.image_parts(), cluster_of_column.astype(np.int32), weights_K, seed)
    return np.concatenate(list(parts))


def _vote_part(
    heads: Heads, start: int, stop: int, cluster_of_column: Labels, weights_K: npt.NDArray[Any] | None, seed: int
) -> Labels:
    votes_nH = heads.read(start, stop).votes(cluster_of_column)
    return rank_votes(votes_nH, 1, seed=seed, cluster_weights=weights_K)[0][:, 0]


def rank_votes(
    votes_nH: npt.NDArray[Any], num_ranks: int, *, seed: int | None, cluster_weights: Floats | None = None
) -> tuple[Labels, Floats, Floats]:
    """The `num_ranks` clusters with the most votes for each image, given the cluster that each head votes for (n, H),
    -1 where it does not vote. Returns clusters (n, R) int32, -1 where fewer got votes; their scores (n, R), votes times
    `cluster_weights` (K,), 0 there; and the entropy (n,) of the image's votes (unweighted), in nats. `seed` breaks
    ties; None: the lowest cluster wins."""
    num_rows, num_heads = votes_nH.shape
    votes = np.sort(votes_nH.astype(np.int32, copy=False), axis=1)
    starts_run = np.ones((num_rows, num_heads), dtype=bool)
    starts_run[:, 1:] = votes[:, 1:] != votes[:, :-1]
    starts = np.flatnonzero(starts_run)
    run_lengths = np.diff(np.append(starts, num_rows * num_heads)).astype(np.float64)
    rows = (starts // num_heads).astype(np.int32)
    clusters = votes.ravel()[starts]
    valid = clusters >= 0
    rows, clusters, run_lengths = rows[valid], clusters[valid], run_lengths[valid]

    num_votes = np.maximum(np.bincount(rows, weights=run_lengths, minlength=num_rows), 1.0)
    surprise = run_lengths * np.log(run_lengths)
    entropy_n = np.log(num_votes) - np.bincount(rows, weights=surprise, minlength=num_rows) / num_votes

    scores = run_lengths if cluster_weights is None else run_lengths * cluster_weights[clusters]
    ranked_nR = np.full((num_rows, num_ranks), -1, dtype=np.int32)
    scores_nR = np.zeros((num_rows, num_ranks))
    for rank in range(num_ranks):
        chosen = _best_of_each_row(rows, clusters, scores, votes, seed)
        ranked_nR[rows[chosen], rank] = clusters[chosen]
        scores_nR[rows[chosen], rank] = scores[chosen]
        rows, clusters, scores = (np.delete(values, chosen) for values in (rows, clusters, scores))
    return ranked_nR, scores_nR, np.maximum(entropy_n, 0.0)


def _best_of_each_row(
    rows: npt.NDArray[Any], clusters: npt.NDArray[Any], scores: Floats, votes: Labels, seed: int | None
) -> npt.NDArray[np.int64]:
    """Positions of the highest score of each row; `rows` ascend. Ties go by the hash, or to the first."""
    if not len(rows):
        return np.empty(0, dtype=np.int64)
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    best = np.repeat(np.maximum.reduceat(scores, starts), np.diff(np.append(starts, len(rows))))
    tied = np.flatnonzero(scores == best)
    if len(tied) == len(starts):
        return tied
    firsts = np.flatnonzero(np.diff(rows[tied], prepend=-1))
    if seed is None:
        return tied[firsts]
    # The sum of the votes' hashes does not depend on their order, so images with equal votes break ties alike.
    values = np.arange(int(votes.max()) + 2)
    hash_of_vote = hash_numbers(values, np.zeros_like(values), seed)
    keys = hash_of_vote[votes[rows[tied[firsts]]] + 1].sum(axis=1, dtype=np.uint64)
    keys = np.repeat(keys, np.diff(np.append(firsts, len(tied))))
    order = np.lexsort((hash_numbers(keys, clusters[tied], seed), rows[tied]))
    is_last = np.diff(rows[tied][order], append=-1) != 0
    chosen: npt.NDArray[np.int64] = tied[order[is_last]]
    return chosen
