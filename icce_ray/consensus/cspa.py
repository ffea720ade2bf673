"""CSPA: the matrix of how often two images share a cluster, cut into K parts (Strehl & Ghosh 2002; METHOD section 3).

The only function here that compares images with images: N x N, for small N. Images that every head labels alike are one
vertex of their number's weight.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from icce_ray.consensus.hbgf import group_equal_images
from icce_ray.consensus.label_matrix import HeadLabels, Heads, Labels
from icce_ray.consensus.partition import PartitionError, partition_graph


def co_association(heads: HeadLabels) -> sp.csr_array:
    """Number of heads that put two images into one cluster: (N, N) int32 with H (labels given) on the diagonal."""
    columns_NH = heads.columns()
    present = columns_NH >= 0
    rows, head_index = np.nonzero(present)
    ones = np.ones(len(rows), dtype=np.int32)
    shape = (len(columns_NH), heads.num_head_clusters)
    membership_NC = sp.csr_array((ones, (rows, columns_NH[rows, head_index])), shape=shape)
    return sp.csr_array(membership_NC @ membership_NC.T)


def cspa(heads: Heads, num_clusters: int, *, imbalance: float, seeds: list[int], max_images: int) -> list[Labels]:
    """Consensus labels (N,), 0..num_clusters-1, one vector for each seed. Parts may be empty.

    Raises:
        PartitionError: METIS failed, or there are more images than `max_images`.
    """
    if heads.num_images > max_images:
        raise PartitionError(f"{heads.num_images:,} images are more than cspa_max_images, {max_images:,}")
    gathered = heads.gather()
    first_G, group_N = group_equal_images(gathered)
    if len(first_G) < num_clusters:
        raise PartitionError(f"only {len(first_G)} images differ in their labels, fewer than {num_clusters} clusters")
    images_G = np.bincount(group_N)
    graph = co_association(HeadLabels(gathered.codes[:, first_G], gathered.values)).tocoo()
    rows, columns = graph.coords
    off_diagonal = rows != columns
    rows, columns = rows[off_diagonal], columns[off_diagonal]
    weights = graph.data[off_diagonal].astype(np.int64) * images_G[rows] * images_G[columns]
    scale = max(1.0, float(weights.max(initial=1)) / 1e6)
    weights = np.maximum(np.rint(weights / scale), 1).astype(np.int32)
    graph = sp.csr_array((weights, (rows, columns)), shape=graph.shape)
    parts = partition_graph(graph, num_clusters, vertex_weights=images_G, imbalance=imbalance, seeds=seeds)
    return [part[group_N] for part in parts]
