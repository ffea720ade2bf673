"""Refinement of a consensus: images move to other clusters as long as that raises the ANMI (docs/METHOD.md,
"Refinement").

For each head, the mutual information is a sum of f(count) = count log count over the cells of the contingency table. So
the gain of a move follows from the table alone, and one pass finds the best move of every image. Moves made together
are kept only if the exact ANMI rose; otherwise the better half of them is tried. The ANMI never falls below that of the
start.

Shape letters: N images, n images of a part, b images of a block, r contested images, H heads, C head clusters, K
clusters, M candidate clusters of an image.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.aligned_vote import rank_votes
from icce_ray.consensus.label_matrix import PART_LABELS, Counts, HeadLabels, Heads, Labels, count_consensus
from icce_ray.metrics.contingency import anmi_from_counts, entropy, mutual_information

MAX_DENSE_CLUSTERS = 32
"""Up to this many clusters, an image may move to any of them; above, to the NUM_CANDIDATES that its heads vote for."""
NUM_CANDIDATES = 4
MIN_RIVAL_SHARE = 0.5
"""Above MAX_DENSE_CLUSTERS, only images are considered for which a rival has this share of the votes of their own
cluster: the others gain nothing by a move."""
MIN_GAIN = 1e-7
"""The passes end with the first one that raises the ANMI by less."""
MAX_HALVINGS = 6


def refine(
    start_N: npt.NDArray[Any], heads: Heads, num_clusters: int, *, max_passes: int = 100
) -> tuple[Labels, float]:
    """Move images between clusters until the ANMI stops rising, or `max_passes` times. A cluster with images keeps at
    least one. Returns (N,) int32 labels and their ANMI, not lower than the start's."""
    labels_N: Labels = start_N.astype(np.int32)
    counts_KC = count_consensus(labels_N, heads, num_clusters)
    best = anmi_from_counts(counts_KC, heads.offsets)
    for _ in range(max_passes):
        target_N, gain_N = _best_moves(labels_N, counts_KC, heads)
        movers = np.flatnonzero(gain_N > 0)
        movers = movers[np.argsort(-gain_N[movers], kind="stable")]
        before = best
        for _ in range(MAX_HALVINGS):
            movers = leave_no_cluster_empty(movers, labels_N, num_clusters)
            if not len(movers):
                break
            moved_N = labels_N.copy()
            moved_N[movers] = target_N[movers]
            moved_KC = count_consensus(moved_N, heads, num_clusters)
            value = anmi_from_counts(moved_KC, heads.offsets)
            if value > best:
                labels_N, counts_KC, best = moved_N, moved_KC, value
                break
            movers = movers[: len(movers) // 2]
        if best - before < MIN_GAIN:
            break
    return labels_N, best


def leave_no_cluster_empty(movers: npt.NDArray[np.int64], labels_N: Labels, num_clusters: int) -> npt.NDArray[np.int64]:
    """The movers without those of clusters that all images would leave."""
    sizes_K = np.bincount(labels_N, minlength=num_clusters)
    leaving_K = np.bincount(labels_N[movers], minlength=num_clusters)
    emptied_K = (leaving_K == sizes_K) & (sizes_K > 0)
    staying: npt.NDArray[np.int64] = movers[~emptied_K[labels_N[movers]]]
    return staying


class _Weights(NamedTuple):
    """Terms of a move's gain that the counts do not hold."""

    cell_weight_H: npt.NDArray[np.float64]
    """For each head, weight of the increase of a cell's x log x."""
    size_weight_H: npt.NDArray[np.float64]
    """For each head, weight of the increase of a cluster's x log x."""
    sizes_KH: Counts
    """Images of each cluster that each head labels."""
    cluster_of_column: Labels
    """The cluster that each head cluster votes for (C,)."""


def _gain_weights(counts_KC: npt.NDArray[Any], heads: Heads) -> _Weights:
    cell_weight_H, size_weight_H = np.zeros(heads.num_heads), np.zeros(heads.num_heads)
    sizes_KH = np.empty((len(counts_KC), heads.num_heads), dtype=np.int64)
    for head, (start, stop) in enumerate(pairwise(heads.offsets)):
        table = counts_KC[:, start:stop]
        sizes_KH[:, head] = table.sum(axis=1)
        entropy_head, entropy_consensus = entropy(table.sum(axis=0)), entropy(sizes_KH[:, head])
        if entropy_head == 0.0 or entropy_consensus == 0.0:
            continue
        norm = np.sqrt(entropy_head * entropy_consensus)
        per_image = 1.0 / (heads.num_heads * table.sum())
        cell_weight_H[head] = per_image / norm
        # The entropy of the consensus appears in the mutual information and, as a square root, in the norm.
        nmi = mutual_information(table) / norm
        size_weight_H[head] = per_image * (nmi / (2 * entropy_consensus) - 1.0 / norm)
    return _Weights(cell_weight_H, size_weight_H, sizes_KH, counts_KC.argmax(axis=0).astype(np.int32))


def _best_moves(labels_N: Labels, counts_KC: npt.NDArray[Any], heads: Heads) -> tuple[Labels, npt.NDArray[np.float64]]:
    """Best other cluster of each image, and by how much moving there alone raises the ANMI (to first order in the
    entropy of the consensus); 0 for images that are not contested."""
    weights = _gain_weights(counts_KC, heads)
    parts = list(heads.map(_best_moves_of_part, heads.image_parts(), labels_N, counts_KC, weights))
    return np.concatenate([target for target, _ in parts]), np.concatenate([gain for _, gain in parts])


def _best_moves_of_part(
    heads: Heads, start: int, stop: int, labels_N: Labels, counts_KC: npt.NDArray[Any], weights: _Weights
) -> tuple[Labels, npt.NDArray[np.float64]]:
    part, own_n = heads.read(start, stop), labels_N[start:stop]
    columns_nH = part.columns()
    if len(counts_KC) <= MAX_DENSE_CLUSTERS:
        target_n, gain_n = _best_of_all_clusters(columns_nH, own_n, counts_KC, weights, part.num_clusters)
        return target_n, gain_n - _score_staying(columns_nH, own_n, counts_KC, weights)
    rows, candidates_rM = _contested(part, own_n, weights.cluster_of_column)
    columns_rH, own_r = columns_nH[rows], own_n[rows]
    scores_rM = _score_candidates(columns_rH, candidates_rM, counts_KC, weights)
    scores_rM[(candidates_rM == own_r[:, None]) | (candidates_rM < 0)] = -np.inf
    best_r1 = scores_rM.argmax(axis=1)[:, None]
    target_n, gain_n = own_n.copy(), np.zeros(len(own_n))
    target_n[rows] = np.take_along_axis(candidates_rM, best_r1, axis=1)[:, 0]
    best_scores_r = np.take_along_axis(scores_rM, best_r1, axis=1)[:, 0]
    gain_n[rows] = best_scores_r - _score_staying(columns_rH, own_r, counts_KC, weights)
    return target_n, gain_n


def _best_of_all_clusters(
    columns_nH: Counts, own_n: Labels, counts_KC: npt.NDArray[Any], weights: _Weights, num_clusters_H: Counts
) -> tuple[Labels, npt.NDArray[np.float64]]:
    """The other cluster to which each image adds most (n,), and how much it adds (n,)."""
    num_clusters = len(counts_KC)
    head_of_column = np.repeat(np.arange(len(num_clusters_H)), num_clusters_H)
    # What an image of a head cluster adds to each cluster, if it is not in it yet.
    adds_KC = weights.cell_weight_H[head_of_column] * _increment(counts_KC)
    adds_KC += (weights.size_weight_H * _increment(weights.sizes_KH))[:, head_of_column]
    adds_CK = np.ascontiguousarray(adds_KC.T)
    target_n, score_n = np.empty(len(own_n), dtype=np.int32), np.empty(len(own_n))
    step = max(1, PART_LABELS // (len(num_clusters_H) * num_clusters))
    for begin in range(0, len(own_n), step):
        block = slice(begin, begin + step)
        scores_bK = np.zeros((len(own_n[block]), num_clusters))
        for columns_b in columns_nH[block].T:
            scores_bK += np.where(columns_b[:, None] >= 0, adds_CK[columns_b], 0.0)
        np.put_along_axis(scores_bK, own_n[block, None], -np.inf, axis=1)
        target_n[block], score_n[block] = scores_bK.argmax(axis=1), scores_bK.max(axis=1)
    return target_n, score_n


def _contested(part: HeadLabels, own_n: Labels, cluster_of_column: Labels) -> tuple[npt.NDArray[np.int64], Labels]:
    """The images (r,) for which a rival has enough votes, and the candidates (r, M) of each."""
    votes_nH = part.votes(cluster_of_column)
    own_votes_n = (votes_nH == own_n[:, None]).sum(axis=1)
    others_n = (votes_nH >= 0).sum(axis=1) - own_votes_n
    # The other images have too few other votes altogether.
    rows = np.flatnonzero((others_n >= MIN_RIVAL_SHARE * own_votes_n) & (others_n > 0))
    ranked_rM, scores_rM, _ = rank_votes(votes_nH[rows], NUM_CANDIDATES, seed=None)
    rivals_rM = (ranked_rM >= 0) & (ranked_rM != own_n[rows, None])
    contested = (rivals_rM & (scores_rM >= MIN_RIVAL_SHARE * own_votes_n[rows, None])).any(axis=1)
    return rows[contested], ranked_rM[contested]


def _score_candidates(
    columns_rH: npt.NDArray[np.int64], candidates_rM: Labels, counts_KC: npt.NDArray[Any], weights: _Weights
) -> npt.NDArray[np.float64]:
    """What an image adds to each candidate (r, M), if it is not in it yet."""
    scores_rM = np.zeros(candidates_rM.shape)
    for head, columns_r in enumerate(columns_rH.T):
        cells_rM = counts_KC[candidates_rM, columns_r[:, None]]
        added_rM = weights.cell_weight_H[head] * _increment(cells_rM)
        added_rM += weights.size_weight_H[head] * _increment(weights.sizes_KH[candidates_rM, head])
        scores_rM += np.where(columns_r[:, None] >= 0, added_rM, 0.0)
    return scores_rM


def _score_staying(
    columns_rH: npt.NDArray[np.int64], own_r: Labels, counts_KC: npt.NDArray[Any], weights: _Weights
) -> npt.NDArray[np.float64]:
    """What an image adds to the cluster that it is in (r,)."""
    scores_r = np.zeros(len(own_r))
    for head, columns_r in enumerate(columns_rH.T):
        present_r = columns_r >= 0
        cell_r = np.where(present_r, counts_KC[own_r, columns_r], 1)
        size_r = np.where(present_r, weights.sizes_KH[own_r, head], 1)
        kept_r = weights.cell_weight_H[head] * _increment(cell_r - 1)
        scores_r += np.where(present_r, kept_r + weights.size_weight_H[head] * _increment(size_r - 1), 0.0)
    return scores_r


def _increment(x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """f(x + 1) - f(x) for f(x) = x log x."""
    x = x.astype(np.float64)
    increments: npt.NDArray[np.float64] = np.log(x + 1) + x * np.log1p(1 / np.maximum(x, 1.0))
    return increments
