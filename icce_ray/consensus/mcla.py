"""MCLA: clusters of clusters, then a vote (Strehl & Ghosh 2002; docs/METHOD.md, "MCLA").

The vertices of the graph are the clusters of all heads, and edges weigh how much two clusters overlap (Jaccard). METIS
cuts it into K meta-clusters, and each image goes to the meta-cluster that its clusters are associated with most. The
graph comes from contingency counts and the vote is made image by image, so MCLA works for any number of images.
"""

import numpy as np

from icce_ray.consensus.head_overlaps import HeadPairs
from icce_ray.consensus.label_matrix import Heads, Labels
from icce_ray.consensus.partition import PartitionError, partition_graph
from icce_ray.consensus.votes import vote

MAX_EDGES = 50_000_000
"""If more pairs of clusters overlap, MCLA is left out: METIS needs about 100 bytes for each."""


def mcla(heads: Heads, pairs: HeadPairs, num_clusters: int, *, imbalance: float, seeds: list[int]) -> list[Labels]:
    """Consensus labels (N,), 0..num_clusters-1. Clusters may be empty.

    There are two results for each seed. METIS balances the weights of the parts, and a head cluster weighs its images
    (Strehl & Ghosh) or 1. With equal weights, a meta-cluster gets about one cluster of each head, however large, which
    suits unbalanced data: planted power-law clusters are recovered exactly, against two thirds of them. Raises
    PartitionError: METIS failed, or the graph is too large for it."""
    if heads.num_head_clusters <= num_clusters:
        return [vote(heads, np.arange(heads.num_head_clusters), num_clusters, seed=seeds[0], by_mean=True)]
    num_edges = len(pairs.edges.weights)
    if num_edges > MAX_EDGES:
        raise PartitionError(f"its graph has {num_edges:,} edges, over the limit of {MAX_EDGES:,}")
    graph, sizes_C = pairs.cluster_graph(), heads.head_cluster_sizes()
    return [
        vote(heads, meta_C, num_clusters, seed=seeds[0], by_mean=True)
        for weights in (sizes_C, None)
        for meta_C in partition_graph(graph, num_clusters, vertex_weights=weights, imbalance=imbalance, seeds=seeds)
    ]
