"""MCLA: clusters of clusters, then a vote (Strehl & Ghosh 2002; METHOD section 3).

The clusters of all heads are the vertices of a graph whose edges weigh how much two clusters overlap (Jaccard). METIS
cuts it into K meta-clusters; each image goes to the meta-cluster with which its clusters are associated most. The graph
comes from contingency counts and the vote is made image by image, so both passes run over shards of any size.

Shape letters: N images, H heads, C head clusters, K meta-clusters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from icce_ray.consensus.contingency import MISSING, Counts, HeadLabels, Labels, count_pairs
from icce_ray.consensus.partition import partition_graph
from icce_ray.consensus.votes import block_rows, rank_votes

MAX_FULL_CLUSTERS = 2000
MIN_JACCARD = 0.01
"""With more head clusters than that, pairs that overlap less get no edge: most of the pairs, and chance alone."""
JACCARD_SCALE = 1000
"""Edge weights are integers for METIS: thousandths of the Jaccard similarity."""


def head_pair_counts(heads: HeadLabels) -> Iterator[tuple[int, int, sp.csr_array]]:
    """Contingency counts of every pair of heads g < h. One pair at a time: they add up over shards of images."""
    sizes = heads.num_clusters
    for g in range(heads.num_heads):
        for h in range(g + 1, heads.num_heads):
            yield g, h, count_pairs(heads.codes[g], heads.codes[h], int(sizes[g]), int(sizes[h]))


def cluster_graph(
    pair_counts: Iterable[tuple[int, int, sp.csr_array]],
    head_cluster_sizes: Counts,
    offsets: Counts,
) -> sp.csr_array:
    """Graph of the head clusters: (C, C) symmetric int32, Jaccard similarities in thousandths.

    Args:
        pair_counts: (g, h, counts) for the pairs of heads g < h.
        head_cluster_sizes: (C,) images per head cluster.
        offsets: (H+1,) first head cluster of each head.
    """
    num_head_clusters = int(offsets[-1])
    min_jaccard = MIN_JACCARD if num_head_clusters > MAX_FULL_CLUSTERS else 0.5 / JACCARD_SCALE
    rows, columns, weights = [], [], []
    for g, h, counts in pair_counts:
        cells = counts.tocoo()
        row, column = cells.coords[0] + offsets[g], cells.coords[1] + offsets[h]
        union = head_cluster_sizes[row] + head_cluster_sizes[column] - cells.data
        jaccard = cells.data / union
        kept = jaccard >= min_jaccard
        rows.append(row[kept])
        columns.append(column[kept])
        weights.append(np.maximum(np.rint(jaccard[kept] * JACCARD_SCALE), 1).astype(np.int32))
    shape = (num_head_clusters, num_head_clusters)
    if not rows:
        return sp.csr_array(shape, dtype=np.int32)
    edges = (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns)))
    upper = sp.csr_array(sp.coo_array(edges, shape=shape))
    return sp.csr_array(upper + upper.T)


def vote(
    heads: HeadLabels, meta_of_head_cluster: npt.NDArray[Any], num_clusters: int, *, seed: int, by_mean: bool = True
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
    labels_N = np.empty(heads.num_images, dtype=np.int32)
    step = block_rows(heads.num_heads)
    for start in range(0, heads.num_images, step):
        columns_nH = heads.columns(start, start + step)
        votes_nH = np.where(columns_nH >= 0, meta_of_head_cluster[columns_nH], MISSING)
        ranked_n1, _, _ = rank_votes(votes_nH, 1, seed=seed, cluster_weights=weights_K)
        labels_N[start : start + len(votes_nH)] = ranked_n1[:, 0]
    return labels_N


def mcla(heads: HeadLabels, num_clusters: int, *, imbalance: float, seeds: list[int]) -> list[Labels]:
    """Consensus labels (N,), 0..num_clusters-1. Clusters may be empty.

    Two vectors for each seed: METIS balances the parts' weights, and a head cluster weighs its images [S] or 1 [ours].
    With equal weights a meta-cluster gets about one cluster of each head, however large: on unbalanced data that is the
    right balance (planted power-law clusters are recovered exactly where [S] gives two thirds of them).

    Raises:
        PartitionError: METIS failed.
    """
    if heads.num_head_clusters <= num_clusters:
        return [vote(heads, np.arange(heads.num_head_clusters), num_clusters, seed=seeds[0])]
    sizes_C = heads.head_cluster_sizes()
    graph = cluster_graph(head_pair_counts(heads), sizes_C, heads.offsets)
    metas = [
        meta_C
        for weights in (sizes_C, None)
        for meta_C in partition_graph(graph, num_clusters, vertex_weights=weights, imbalance=imbalance, seeds=seeds)
    ]
    return [vote(heads, meta_C, num_clusters, seed=seeds[0]) for meta_C in metas]
