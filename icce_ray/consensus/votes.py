"""Votes of the heads for clusters, image by image: who wins, who comes second, how divided they are.

Works on blocks of images: no matrix of images times clusters. Ties are broken by a hash of the image's votes, the
cluster and the seed: the answer depends neither on the blocks nor on the images' order, and equal images stay together.

Shape letters: n images of a block, H heads, R ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK_VOTES = 1 << 21
"""Votes handled at once: bounds the memory (about 100 bytes a vote)."""


def block_rows(num_heads: int) -> int:
    return max(1, BLOCK_VOTES // max(num_heads, 1))


def rank_votes(
    votes_nH: npt.NDArray[Any],
    num_ranks: int,
    *,
    seed: int | None,
    cluster_weights: npt.NDArray[np.float64] | None = None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The `num_ranks` clusters with the most votes for each image.

    Args:
        votes_nH: (n, H) cluster that each head votes for, -1 where it does not vote.
        num_ranks: clusters returned per image.
        seed: of the tie-break; None: the lowest cluster wins.
        cluster_weights: (K,) weight of a vote for each cluster; not given: 1.

    Returns:
        clusters (n, R) int32, -1 where fewer got votes; their scores (n, R), votes times weight, 0 there; and the
        entropy (n,) in nats of the image's votes (unweighted).
    """
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

    scores = run_lengths.copy() if cluster_weights is None else run_lengths * cluster_weights[clusters]
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
    """Positions of the highest score of each row; `rows` ascend. Equal scores: by hash, or the first."""
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
    # A hash of the votes that does not depend on their order: equal images break ties alike.
    hash_of_cluster = hash_numbers(np.arange(int(votes.max()) + 2), 0, seed)
    keys = hash_of_cluster[votes[rows[tied[firsts]]] + 1].sum(axis=1, dtype=np.uint64)
    keys = np.repeat(keys, np.diff(np.append(firsts, len(tied))))
    order = np.lexsort((hash_numbers(keys, clusters[tied], seed), rows[tied]))
    is_last = np.diff(rows[tied][order], append=-1) != 0
    chosen: npt.NDArray[np.int64] = tied[order[is_last]]
    return chosen


def hash_numbers(a: npt.NDArray[Any], b: npt.NDArray[Any] | int, seed: int) -> npt.NDArray[np.uint64]:
    """Evenly spread 64-bit numbers that depend on `a`, `b` and the seed only (splitmix64)."""
    with np.errstate(over="ignore"):
        mixed = a.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = _mix(mixed + np.uint64(seed)) + np.asarray(b).astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        return _mix(mixed)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
