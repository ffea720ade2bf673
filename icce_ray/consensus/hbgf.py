"""HBGF: the bipartite graph of images and clusters, cut into K parts (Fern & Brodley, ICML 2004; METHOD section 3).

Images that every head labels alike are one vertex of their number's weight: the cut is the same, the graph smaller.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from icce_ray.consensus.label_matrix import HeadLabels, Heads, Labels
from icce_ray.consensus.partition import PartitionError, partition_graph
from icce_ray.consensus.votes import hash_numbers

MAX_EDGES = 3_000_000
"""METIS needs about two microseconds and 100 bytes for an edge (an image's label from a head), and its cuts of larger
graphs are poor: above this many HBGF is left out."""


def group_equal_images(heads: HeadLabels) -> tuple[np.ndarray, np.ndarray]:
    """Images with the same labels from every head: first image of each group (G,), and group of each image (N,).

    Groups are compared by a 64-bit hash of the labels; two of a million groups collide with a chance of 10^-7.
    """
    keys_N = np.zeros(heads.num_images, dtype=np.uint64)
    for codes_N in heads.codes:
        keys_N = hash_numbers(keys_N, codes_N + 1, seed=0)
    _, first_G, group_N = np.unique(keys_N, return_index=True, return_inverse=True)
    return first_G, group_N


def hbgf(heads: Heads, num_clusters: int, *, imbalance: float, seeds: list[int]) -> list[Labels]:
    """Consensus labels (N,), 0..num_clusters-1, one vector for each seed. Parts may be empty.

    Raises:
        PartitionError: METIS failed, or the graph is too large for it.
    """
    num_edges = int(heads.head_cluster_sizes().sum())
    if num_edges > MAX_EDGES:
        raise PartitionError(f"its graph has {num_edges:,} edges, over the limit of {MAX_EDGES:,}")
    gathered = heads.gather()
    first_G, group_N = group_equal_images(gathered)
    num_groups = len(first_G)
    if num_groups < num_clusters:
        raise PartitionError(f"only {num_groups} images differ in their labels, fewer than {num_clusters} clusters")
    images_G = np.bincount(group_N)
    columns_GH = gathered.columns()[first_G]
    present = columns_GH >= 0
    rows, head_index = np.nonzero(present)
    columns = columns_GH[rows, head_index] + num_groups
    num_vertices = num_groups + heads.num_head_clusters
    shape = (num_vertices, num_vertices)
    upper = sp.csr_array(sp.coo_array((images_G[rows].astype(np.int32), (rows, columns)), shape=shape))
    weights = np.concatenate([images_G, np.ones(heads.num_head_clusters, dtype=np.int64)])
    parts = partition_graph(
        sp.csr_array(upper + upper.T), num_clusters, vertex_weights=weights, imbalance=imbalance, seeds=seeds
    )
    return [part[:num_groups][group_N] for part in parts]
