"""Refinement of a consensus: images move to other clusters as long as that raises the ANMI [ours, METHOD section 3].

Per head the mutual information is a sum of f(count) = count log count over the cells of the contingency table, so what
a move gains follows from the table alone, and all images' best moves come from one pass. Moves made together are kept
only where the exact ANMI rose; otherwise the better half of them is tried. The result never has a lower ANMI than the
start.

Shape letters: N images, n of a piece, r contested images, H heads, C head clusters, K clusters, M candidate clusters of
an image.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.cluster_counts import count_consensus, largest_rows
from icce_ray.consensus.label_matrix import MISSING, Counts, Heads, Labels
from icce_ray.consensus.votes import block_rows, rank_votes
from icce_ray.metrics.nmi import anmi_from_counts, entropy, mutual_information

MAX_DENSE_CLUSTERS = 32
"""Up to this many clusters an image may move to any; above, to the `NUM_CANDIDATES` that its heads vote for."""
NUM_CANDIDATES = 4
MIN_RIVAL_SHARE = 0.5
"""Above that many clusters, an image is looked at where a rival has this share of the votes for its own cluster: with
fewer it gains nothing by a move."""
MIN_GAIN = 1e-7
"""Passes end when one raises the ANMI by less."""
MAX_HALVINGS = 6


def refine(
    start_N: npt.NDArray[Any], heads: Heads, num_clusters: int, *, max_passes: int = 100
) -> tuple[Labels, float]:
    """Move images between clusters until the ANMI stops rising.

    Args:
        start_N: (N,) integers 0..num_clusters-1.
        heads: the label matrix.
        num_clusters: clusters (K). A cluster that has images keeps at least one.
        max_passes: passes over the images at most.

    Returns:
        (N,) int32 labels and their ANMI, not lower than the start's.
    """
    labels_N: Labels = start_N.astype(np.int32)
    counts_KC = count_consensus(labels_N, heads, num_clusters)
    best = anmi_from_counts(counts_KC, heads.offsets)
    for _ in range(max_passes):
        target_N, gain_N = _best_moves(labels_N, counts_KC, heads)
        movers = np.flatnonzero(gain_N > 0)
        movers = movers[np.argsort(-gain_N[movers], kind="stable")]
        before = best
        for _ in range(MAX_HALVINGS):
            movers = _leave_no_cluster_empty(movers, labels_N, num_clusters)
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


def _leave_no_cluster_empty(
    movers: npt.NDArray[np.int64], labels_N: Labels, num_clusters: int
) -> npt.NDArray[np.int64]:
    """Without the movers whose cluster all its images would leave."""
    sizes_K = np.bincount(labels_N, minlength=num_clusters)
    leaving_K = np.bincount(labels_N[movers], minlength=num_clusters)
    emptied_K = (leaving_K == sizes_K) & (sizes_K > 0)
    return movers[~emptied_K[labels_N[movers]]] if emptied_K.any() else movers


class _Terms(NamedTuple):
    """What the gain of a move is made of, besides the counts."""

    cell_weight_H: npt.NDArray[np.float64]
    """Of the increment of a cell's x log x, per head."""
    size_weight_H: npt.NDArray[np.float64]
    """Of the increment of a cluster's."""
    sizes_KH: Counts
    """Images per cluster among those that a head labels (K, H)."""
    cluster_of_column: npt.NDArray[np.int32]
    """The cluster that a head cluster votes for (C,)."""


def _best_moves(labels_N: Labels, counts_KC: npt.NDArray[Any], heads: Heads) -> tuple[Labels, npt.NDArray[np.float64]]:
    """Best other cluster of each image, and by how much moving there alone raises the ANMI (to first order in the
    entropy of the consensus); 0 for images that are not contested."""
    terms = _gain_terms(counts_KC, heads)
    pieces = list(heads.map(_best_moves_of_piece, heads.image_pieces(), labels_N, counts_KC, terms))
    return np.concatenate([target for target, _ in pieces]), np.concatenate([gain for _, gain in pieces])


def _best_moves_of_piece(
    heads: Heads, start: int, stop: int, labels_N: Labels, counts_KC: npt.NDArray[Any], terms: _Terms
) -> tuple[Labels, npt.NDArray[np.float64]]:
    part = heads.read(start, stop)
    num_clusters = len(counts_KC)
    dense = num_clusters <= MAX_DENSE_CLUSTERS
    adds_CK = _adds(counts_KC, terms, part.num_clusters) if dense else None
    target_n = labels_N[start:stop].astype(np.int32)
    gain_n = np.zeros(stop - start)
    step = max(1, block_rows(heads.num_heads) // (num_clusters if dense else 1))
    for begin in range(0, stop - start, step):
        columns_nH = part.columns(begin, begin + step)
        own_n = labels_N[start + begin : start + begin + len(columns_nH)]
        if adds_CK is not None:
            rows = np.arange(len(own_n))
            candidates_rM: Labels = np.broadcast_to(np.arange(num_clusters, dtype=np.int32), (len(own_n), num_clusters))
            scores_rM = np.zeros(candidates_rM.shape)
            for columns_n in columns_nH.T:
                scores_rM += np.where(columns_n[:, None] >= 0, adds_CK[columns_n], 0.0)
        else:
            rows, candidates_rM = _contested(columns_nH, own_n, terms.cluster_of_column)
            columns_nH, own_n = columns_nH[rows], own_n[rows]
            scores_rM = _score_candidates(columns_nH, candidates_rM, counts_KC, terms)
        if not len(rows):
            continue
        scores_rM[(candidates_rM == own_n[:, None]) | (candidates_rM < 0)] = -np.inf
        best_r = scores_rM.argmax(axis=1)
        every = np.arange(len(rows))
        target_n[begin + rows] = candidates_rM[every, best_r]
        gain_n[begin + rows] = scores_rM[every, best_r] - _score_staying(columns_nH, own_n, counts_KC, terms)
    return target_n, gain_n


def _contested(
    columns_nH: npt.NDArray[np.int64], own_n: Labels, cluster_of_column: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int64], Labels]:
    """The images (r,) where a rival has enough votes, and the candidates (r, M) of each."""
    votes_nH = np.where(columns_nH >= 0, cluster_of_column[columns_nH], np.int32(MISSING))
    own_votes_n = (votes_nH == own_n[:, None]).sum(axis=1)
    others_n = (votes_nH >= 0).sum(axis=1) - own_votes_n
    # All other votes together would not make a rival.
    rows = np.flatnonzero((others_n >= MIN_RIVAL_SHARE * own_votes_n) & (others_n > 0))
    ranked_rM, scores_rM, _ = rank_votes(votes_nH[rows], NUM_CANDIDATES, seed=None)
    rivals_rM = (ranked_rM >= 0) & (ranked_rM != own_n[rows, None])
    contested = (rivals_rM & (scores_rM >= MIN_RIVAL_SHARE * own_votes_n[rows, None])).any(axis=1)
    return rows[contested], ranked_rM[contested]


def _score_candidates(
    columns_rH: npt.NDArray[np.int64], candidates_rM: Labels, counts_KC: npt.NDArray[Any], terms: _Terms
) -> npt.NDArray[np.float64]:
    """What an image adds to each candidate (r, M), if it is not in it yet."""
    scores_rM = np.zeros(candidates_rM.shape)
    for head, columns_r in enumerate(columns_rH.T):
        cells_rM = counts_KC[candidates_rM, columns_r[:, None]]
        added_rM = terms.cell_weight_H[head] * _increment(cells_rM)
        added_rM += terms.size_weight_H[head] * _increment(terms.sizes_KH[candidates_rM, head])
        scores_rM += np.where(columns_r[:, None] >= 0, added_rM, 0.0)
    return scores_rM


def _score_staying(
    columns_rH: npt.NDArray[np.int64], own_r: Labels, counts_KC: npt.NDArray[Any], terms: _Terms
) -> npt.NDArray[np.float64]:
    """What an image adds to the cluster that it is in (r,)."""
    scores_r = np.zeros(len(own_r))
    for head, columns_r in enumerate(columns_rH.T):
        present_r = columns_r >= 0
        cell_r = np.where(present_r, counts_KC[own_r, columns_r], 1)
        size_r = np.where(present_r, terms.sizes_KH[own_r, head], 1)
        kept_r = terms.cell_weight_H[head] * _increment(cell_r - 1)
        scores_r += np.where(present_r, kept_r + terms.size_weight_H[head] * _increment(size_r - 1), 0.0)
    return scores_r


def _adds(counts_KC: npt.NDArray[Any], terms: _Terms, num_clusters_H: Counts) -> npt.NDArray[np.float64]:
    """What an image of head cluster c adds to cluster k (C, K), if it is not in it yet."""
    head_of_column = np.repeat(np.arange(len(num_clusters_H)), num_clusters_H)
    adds_KC = terms.cell_weight_H[head_of_column] * _increment(counts_KC)
    adds_KC += (terms.size_weight_H * _increment(terms.sizes_KH))[:, head_of_column]
    return np.ascontiguousarray(adds_KC.T)


def _increment(x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """f(x + 1) - f(x) of f(x) = x log x."""
    x = x.astype(np.float64)
    increments: npt.NDArray[np.float64] = np.log(x + 1) + x * np.log1p(1 / np.maximum(x, 1.0))
    return increments


def _gain_terms(counts_KC: npt.NDArray[Any], heads: Heads) -> _Terms:
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
        # The consensus's entropy stands in the mutual information and, by its root, in the norm.
        nmi = mutual_information(table) / norm
        size_weight_H[head] = per_image * (nmi / (2 * entropy_consensus) - 1.0 / norm)
    return _Terms(cell_weight_H, size_weight_H, sizes_KH, largest_rows(counts_KC))
