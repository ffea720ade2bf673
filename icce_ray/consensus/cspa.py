"""CSPA: the co-association matrix of the images, cut into K parts (Strehl & Ghosh 2002; docs/METHOD.md, "CSPA").

It compares all pairs of images, so it is left out for large N. Images that all heads label alike are one vertex with
the weight of all.
"""

import numpy as np
import scipy.sparse as sp

from icce_ray.consensus.label_matrix import HeadLabels, Heads, Labels, group_equal_images
from icce_ray.consensus.partition import PartitionError, partition_graph

MAX_IMAGES = 5_000
MAX_WEIGHT = 1e6
"""Larger edge weights are scaled down, to stay within METIS's 32-bit integers."""


def co_association(heads: HeadLabels) -> sp.csr_array:
    """Number of heads that put two images into the same cluster: (N, N) int32, with the number of labels of each image
    on the diagonal."""
    columns_NH = heads.columns()
    rows, head_index = np.nonzero(columns_NH >= 0)
    ones = np.ones(len(rows), dtype=np.int32)
    shape = (len(columns_NH), heads.num_head_clusters)
    membership_NC = sp.csr_array((ones, (rows, columns_NH[rows, head_index])), shape=shape)
    return sp.csr_array(membership_NC @ membership_NC.T)


def cspa(heads: Heads, num_clusters: int, *, imbalance: float, seeds: list[int]) -> list[Labels]:
    """Consensus labels (N,), 0..num_clusters-1, for each seed. Clusters may be empty. Raises PartitionError: METIS
    failed, or there are more than MAX_IMAGES images."""
    if heads.num_images > MAX_IMAGES:
        raise PartitionError(
            f"it compares all pairs of images, and {heads.num_images:,} images are over the limit of {MAX_IMAGES:,}"
        )
    gathered = heads.gather()
    first_G, group_N = group_equal_images(gathered, num_clusters)
    images_G = np.bincount(group_N)
    graph = co_association(HeadLabels(gathered.codes[:, first_G], gathered.values)).tocoo()
    rows, columns = graph.coords
    off_diagonal = rows != columns
    rows, columns = rows[off_diagonal], columns[off_diagonal]
    weights = graph.data[off_diagonal].astype(np.int64) * images_G[rows] * images_G[columns]
    scale = max(1.0, float(weights.max(initial=1)) / MAX_WEIGHT)
    weights = np.maximum(np.rint(weights / scale), 1).astype(np.int32)
    graph = sp.csr_array((weights, (rows, columns)), shape=graph.shape)
    parts = partition_graph(graph, num_clusters, vertex_weights=images_G, imbalance=imbalance, seeds=seeds)
    return [part[group_N] for part in parts]
