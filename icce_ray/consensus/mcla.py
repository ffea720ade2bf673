"""MCLA: clusters of clusters, then a vote (Strehl & Ghosh 2002; METHOD section 3).

The clusters of all heads are the vertices of a graph whose edges weigh how much two clusters overlap (Jaccard). METIS
cuts it into K meta-clusters; each image goes to the meta-cluster with which its clusters are associated most. The graph
comes from contingency counts and the vote is made image by image, so it works at any number of images.

Shape letters: N images, H heads, C head clusters, K meta-clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.head_overlaps import HeadPairs
from icce_ray.consensus.label_matrix import MISSING, Heads, Labels
from icce_ray.consensus.partition import PartitionError, partition_graph
from icce_ray.consensus.votes import block_rows, rank_votes

MAX_EDGES = 50_000_000
"""Above this many overlapping pairs of clusters the graph is left alone: METIS needs about 100 bytes for each."""


def vote(
    heads: Heads, meta_of_head_cluster: npt.NDArray[Any], num_clusters: int, *, seed: int, by_mean: bool = True
) -> Labels:
    """Each image's meta-cluster by the votes of its head clusters: (N,) int32.

    Args:
        heads: the label matrix, or a shard of its images.
        meta_of_head_cluster: (C,) meta-cluster 0..num_clusters-1 of each head cluster.
        num_clusters: meta-clusters (K).
        seed: of the tie-break, which depends on the image's votes only.
        by_mean: association is the mean membership in the meta-cluster's clusters [S]; else the number of votes.
    """
    members_K = np.bincount(meta_of_head_cluster, minlength=num_clusters)
    weights_K = 1.0 / np.maximum(members_K, 1) if by_mean else None
    pieces = heads.map(_vote_piece, heads.image_pieces(), meta_of_head_cluster.astype(np.int32), weights_K, seed)
    return np.concatenate(list(pieces))


def _vote_piece(
    heads: Heads,
    start: int,
    stop: int,
    meta_C: npt.NDArray[np.int32],
    weights_K: npt.NDArray[np.float64] | None,
    seed: int,
) -> Labels:
    part = heads.read(start, stop)
    labels_n = np.empty(stop - start, dtype=np.int32)
    step = block_rows(heads.num_heads)
    for begin in range(0, stop - start, step):
        columns_nH = part.columns(begin, begin + step)
        votes_nH = np.where(columns_nH >= 0, meta_C[columns_nH], np.int32(MISSING))
        ranked_n1, _, _ = rank_votes(votes_nH, 1, seed=seed, cluster_weights=weights_K)
        labels_n[begin : begin + step] = ranked_n1[:, 0]
    return labels_n


def mcla(heads: Heads, pairs: HeadPairs, num_clusters: int, *, imbalance: float, seeds: list[int]) -> list[Labels]:
    """Consensus labels (N,), 0..num_clusters-1. Clusters may be empty.

    Two vectors for each seed: METIS balances the parts' weights, and a head cluster weighs its images [S] or 1 [ours].
    With equal weights a meta-cluster gets about one cluster of each head, however large: on unbalanced data that is the
    right balance (planted power-law clusters are recovered exactly where [S] gives two thirds of them).

    Raises:
        PartitionError: METIS failed, or the graph is too large for it.
    """
    if heads.num_head_clusters <= num_clusters:
        return [vote(heads, np.arange(heads.num_head_clusters), num_clusters, seed=seeds[0])]
    num_edges = len(pairs.edges.weights)
    if num_edges > MAX_EDGES:
        raise PartitionError(f"its graph has {num_edges:,} edges, over the limit of {MAX_EDGES:,}")
    graph, sizes_C = pairs.cluster_graph(), heads.head_cluster_sizes()
    metas = [
        meta_C
        for weights in (sizes_C, None)
        for meta_C in partition_graph(graph, num_clusters, vertex_weights=weights, imbalance=imbalance, seeds=seeds)
    ]
    return [vote(heads, meta_C, num_clusters, seed=seeds[0]) for meta_C in metas]
