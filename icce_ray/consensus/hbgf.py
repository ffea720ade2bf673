"""HBGF: the bipartite graph of images and head clusters, cut into K parts (Fern & Brodley, ICML 2004; docs/METHOD.md,
"HBGF").

Images that all heads label alike are one vertex with the weight of all: the cut is the same, the graph smaller.
"""

import numpy as np
import scipy.sparse as sp

from icce_ray.consensus.label_matrix import Heads, Labels, group_equal_images
from icce_ray.consensus.partition import PartitionError, partition_graph

MAX_EDGES = 3_000_000
"""If there are more edges (labels), HBGF is left out: METIS takes about two microseconds and 100 bytes for each, and
its cuts of large graphs are poor."""


def hbgf(heads: Heads, num_clusters: int, *, imbalance: float, seeds: list[int]) -> list[Labels]:
    """Consensus labels (N,), 0..num_clusters-1, for each seed. Clusters may be empty. Raises PartitionError: METIS
    failed, or the graph is too large for it."""
    num_edges = int(heads.head_cluster_sizes().sum())
    if num_edges > MAX_EDGES:
        raise PartitionError(f"its graph has {num_edges:,} edges, over the limit of {MAX_EDGES:,}")
    gathered = heads.gather()
    first_G, group_N = group_equal_images(gathered, num_clusters)
    num_groups, images_G = len(first_G), np.bincount(group_N)
    columns_GH = gathered.columns()[first_G]
    rows, head_index = np.nonzero(columns_GH >= 0)
    columns = columns_GH[rows, head_index] + num_groups
    shape = (num_groups + heads.num_head_clusters,) * 2
    upper = sp.csr_array(sp.coo_array((images_G[rows].astype(np.int32), (rows, columns)), shape=shape))
    weights = np.concatenate([images_G, np.ones(heads.num_head_clusters, dtype=np.int64)])
    parts = partition_graph(
        sp.csr_array(upper + upper.T), num_clusters, vertex_weights=weights, imbalance=imbalance, seeds=seeds
    )
    return [part[:num_groups][group_N] for part in parts]
