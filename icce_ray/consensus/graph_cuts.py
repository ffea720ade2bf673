"""The consensus functions that cut a graph with METIS: MCLA, HBGF and CSPA (docs/METHOD.md, "Consensus").

MCLA (Strehl & Ghosh 2002): the vertices are the clusters of all heads, and edges weigh how much two of them overlap
(Jaccard). Each image goes to the part that its clusters are associated with most. The graph comes from contingency
counts and the vote is made image by image, so it works for any number of images.

HBGF (Fern & Brodley, ICML 2004): the bipartite graph of images and head clusters. CSPA (Strehl & Ghosh 2002): the
co-association matrix of the images, whose size grows with N x N. In both, images that all heads label alike are one
vertex with the weight of all.

Each returns labels (N,), 0..num_clusters-1, for each seed. Clusters may be empty. Raises PartitionError: METIS failed,
or the graph is too large for it.
"""

import numpy as np
import scipy.sparse as sp

from icce_ray.consensus.head_overlaps import HeadPairs
from icce_ray.consensus.label_matrix import HeadLabels, Heads, Labels, group_equal_images
from icce_ray.consensus.partition import PartitionError, partition_graph
from icce_ray.consensus.votes import vote

MCLA_MAX_EDGES = 50_000_000
"""If more pairs of clusters overlap, MCLA is left out: METIS needs about 100 bytes for each."""
HBGF_MAX_EDGES = 3_000_000
"""If there are more edges (labels), HBGF is left out: METIS takes about two microseconds and 100 bytes for each, and
its cuts of large graphs are poor."""
CSPA_MAX_IMAGES = 5_000
CSPA_MAX_WEIGHT = 1e6
"""Larger edge weights are scaled down, to stay within METIS's 32-bit integers."""


def mcla(heads: Heads, pairs: HeadPairs, num_clusters: int, *, imbalance: float, seeds: list[int]) -> list[Labels]:
    """There are two results for each seed. METIS balances the weights of the parts, and a head cluster weighs its
    images (Strehl & Ghosh) or 1. With equal weights, a meta-cluster gets about one cluster of each head, however large,
    which suits unbalanced data: planted power-law clusters are recovered exactly, against two thirds of them."""
    if heads.num_head_clusters <= num_clusters:
        return [vote(heads, np.arange(heads.num_head_clusters), num_clusters, seed=seeds[0], by_mean=True)]
    num_edges = len(pairs.edges.weights)
    if num_edges > MCLA_MAX_EDGES:
        raise PartitionError(f"its graph has {num_edges:,} edges, over the limit of {MCLA_MAX_EDGES:,}")
    graph, sizes_C = pairs.cluster_graph(), heads.head_cluster_sizes()
    return [
        vote(heads, meta_C, num_clusters, seed=seeds[0], by_mean=True)
        for weights in (sizes_C, None)
        for meta_C in partition_graph(graph, num_clusters, vertex_weights=weights, imbalance=imbalance, seeds=seeds)
    ]


def hbgf(heads: Heads, num_clusters: int, *, imbalance: float, seeds: list[int]) -> list[Labels]:
    num_edges = int(heads.head_cluster_sizes().sum())
    if num_edges > HBGF_MAX_EDGES:
        raise PartitionError(f"its graph has {num_edges:,} edges, over the limit of {HBGF_MAX_EDGES:,}")
    gathered = heads.gather()
    first_G, group_N = group_equal_images(gathered, num_clusters)
    num_groups, images_G = len(first_G), np.bincount(group_N)
    columns_GH = gathered.columns()[first_G]
    rows, head_index = np.nonzero(columns_GH >= 0)
    columns = columns_GH[rows, head_index] + num_groups
    shape = (num_groups + heads.num_head_clusters,) * 2
    upper = sp.csr_array(sp.coo_array((images_G[rows].astype(np.int32), (rows, columns)), shape=shape))
    weights = np.concatenate([images_G, np.ones(heads.num_head_clusters, dtype=np.int64)])
    graph = sp.csr_array(upper + upper.T)
    parts = partition_graph(graph, num_clusters, vertex_weights=weights, imbalance=imbalance, seeds=seeds)
    return [part[:num_groups][group_N] for part in parts]


def cspa(heads: Heads, num_clusters: int, *, imbalance: float, seeds: list[int]) -> list[Labels]:
    if heads.num_images > CSPA_MAX_IMAGES:
        limit = f"{heads.num_images:,} images are over the limit of {CSPA_MAX_IMAGES:,}"
        raise PartitionError(f"it compares all pairs of images, and {limit}")
    gathered = heads.gather()
    first_G, group_N = group_equal_images(gathered, num_clusters)
    images_G = np.bincount(group_N)
    graph = co_association(HeadLabels(gathered.codes[:, first_G], gathered.values)).tocoo()
    rows, columns = graph.coords
    off_diagonal = rows != columns
    rows, columns = rows[off_diagonal], columns[off_diagonal]
    weights = graph.data[off_diagonal].astype(np.int64) * images_G[rows] * images_G[columns]
    scale = max(1.0, float(weights.max(initial=1)) / CSPA_MAX_WEIGHT)
    weights = np.maximum(np.rint(weights / scale), 1).astype(np.int32)
    graph = sp.csr_array((weights, (rows, columns)), shape=graph.shape)
    parts = partition_graph(graph, num_clusters, vertex_weights=images_G, imbalance=imbalance, seeds=seeds)
    return [part[group_N] for part in parts]


def co_association(heads: HeadLabels) -> sp.csr_array:
    """Number of heads that put two images into the same cluster: (N, N) int32, with the number of labels of each image
    on the diagonal."""
    columns_NH = heads.columns()
    rows, head_index = np.nonzero(columns_NH >= 0)
    ones = np.ones(len(rows), dtype=np.int32)
    shape = (len(columns_NH), heads.num_head_clusters)
    membership_NC = sp.csr_array((ones, (rows, columns_NH[rows, head_index])), shape=shape)
    return sp.csr_array(membership_NC @ membership_NC.T)
