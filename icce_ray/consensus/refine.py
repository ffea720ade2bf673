"""Refinement of a consensus: images move to other clusters as long as that raises the ANMI [ours, METHOD section 3].

Per head the mutual information is a sum of f(count) = count log count over the cells of the contingency table, so what
a move gains follows from the table alone, and all images' best moves come from one pass. Moves made together are kept
only where the exact ANMI rose; otherwise the better half of them is tried. The result never has a lower ANMI than the
start.

Shape letters: N images, n of a block, H heads, C head clusters, K clusters, M candidate clusters of an image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.contingency import Counts, HeadLabels, Labels, count_consensus
from icce_ray.consensus.objective import anmi_from_counts, entropy, mutual_information
from icce_ray.consensus.votes import block_rows, rank_votes

MAX_DENSE_CLUSTERS = 32
"""Up to this many clusters an image may move to any; above, to the `NUM_CANDIDATES` that its heads vote for."""
NUM_CANDIDATES = 4
MIN_GAIN = 1e-7
"""Passes end when one raises the ANMI by less."""
MAX_HALVINGS = 6


def refine(
    start_N: npt.NDArray[Any], heads: HeadLabels, num_clusters: int, *, max_passes: int = 100
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
    movers: npt.NDArray[np.int64], labels_N: npt.NDArray[np.integer], num_clusters: int
) -> npt.NDArray[np.int64]:
    """Without the movers whose cluster all its images would leave."""
    sizes_K = np.bincount(labels_N, minlength=num_clusters)
    leaving_K = np.bincount(labels_N[movers], minlength=num_clusters)
    emptied_K = (leaving_K == sizes_K) & (sizes_K > 0)
    return movers[~emptied_K[labels_N[movers]]] if emptied_K.any() else movers


def _best_moves(labels_N: Labels, counts_KC: Counts, heads: HeadLabels) -> tuple[Labels, npt.NDArray[np.float64]]:
    """Best other cluster of each image, and by how much moving there alone raises the ANMI (to first order in the
    entropy of the consensus)."""
    num_clusters = len(counts_KC)
    increments, cell_weight_H, size_weight_H, sizes_KH = _gain_terms(counts_KC, heads)
    head_of_column = np.repeat(np.arange(heads.num_heads), heads.num_clusters)
    # What an image of head cluster c adds to cluster k, if it is not in it yet.
    adds_CK = np.ascontiguousarray(
        (
            cell_weight_H[head_of_column] * increments[counts_KC]
            + size_weight_H[head_of_column] * increments[sizes_KH[:, head_of_column]]
        ).T
    )
    dense = num_clusters <= MAX_DENSE_CLUSTERS
    cluster_of_column = counts_KC.argmax(axis=0)
    target_N = np.empty(heads.num_images, dtype=np.int32)
    gain_N = np.empty(heads.num_images)
    step = max(1, block_rows(heads.num_heads) // (num_clusters if dense else NUM_CANDIDATES))
    for start in range(0, heads.num_images, step):
        columns_nH = heads.columns(start, start + step)
        present_nH = columns_nH >= 0
        own_n = labels_N[start : start + step]
        rows = np.arange(len(own_n))
        if dense:
            everywhere_K = np.arange(num_clusters, dtype=np.int32)
            candidates_nM: Labels = np.broadcast_to(everywhere_K, (len(own_n), num_clusters))
            scores_nM = np.zeros((len(own_n), num_clusters))
        else:
            votes_nH = np.where(present_nH, cluster_of_column[columns_nH], -1)
            candidates_nM, _, _ = rank_votes(votes_nH, NUM_CANDIDATES, seed=None)
            scores_nM = np.zeros(candidates_nM.shape)
        stays_n = np.zeros(len(own_n))
        for head, (columns_n, present_n) in enumerate(zip(columns_nH.T, present_nH.T, strict=True)):
            added_nM = adds_CK[columns_n] if dense else adds_CK[columns_n[:, None], candidates_nM]
            cell_n, size_n = counts_KC[own_n, columns_n], sizes_KH[own_n, head]
            kept_n = cell_weight_H[head] * increments[cell_n - 1] + size_weight_H[head] * increments[size_n - 1]
            scores_nM += np.where(present_n[:, None], added_nM, 0.0)
            stays_n += np.where(present_n, kept_n, 0.0)
        scores_nM[(candidates_nM == own_n[:, None]) | (candidates_nM < 0)] = -np.inf
        best_n = scores_nM.argmax(axis=1)
        target_N[start : start + step] = candidates_nM[rows, best_n]
        gain_N[start : start + step] = scores_nM[rows, best_n] - stays_n
    return target_N, gain_N


def _gain_terms(
    counts_KC: Counts, heads: HeadLabels
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64], Counts]:
    """Increments f(x+1) - f(x) of f(x) = x log x for x = 0..N, the weights of a cell's and of a cluster's increment per
    head, and the clusters' sizes among the images that a head labels (K, H)."""
    x = np.arange(heads.num_images + 2, dtype=np.float64)
    f = x * np.log(np.maximum(x, 1.0))
    cell_weight_H, size_weight_H = np.zeros(heads.num_heads), np.zeros(heads.num_heads)
    sizes_KH = np.empty((len(counts_KC), heads.num_heads), dtype=np.int64)
    for head, (start, stop) in enumerate(zip(heads.offsets[:-1], heads.offsets[1:], strict=True)):
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
    return np.diff(f), cell_weight_H, size_weight_H, sizes_KH
