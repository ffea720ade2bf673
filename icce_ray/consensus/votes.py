"""Votes of the heads for clusters, image by image: which cluster wins, which is second, and how divided they are.

There is no array of images times clusters. Ties are broken by a hash of the image's votes, the cluster and the seed, so
the result depends neither on the parts nor on the order of the images, and images with equal votes stay together.

Shape letters: n images, H heads, R ranks, C head clusters, K clusters.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.label_matrix import Heads, Labels, hash_numbers


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
    votes_nH: npt.NDArray[Any],
    num_ranks: int,
    *,
    seed: int | None,
    cluster_weights: npt.NDArray[np.float64] | None = None,
) -> tuple[Labels, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
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
    rows: npt.NDArray[Any],
    clusters: npt.NDArray[Any],
    scores: npt.NDArray[np.float64],
    votes: npt.NDArray[np.int32],
    seed: int | None,
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
