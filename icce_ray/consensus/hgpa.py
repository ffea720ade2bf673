"""HGPA: the hypergraph whose edges are the clusters of all heads, cut into K parts (Strehl & Ghosh 2002; METHOD
section 3).

hMETIS, which the paper used, is a binary that may not be passed on; Mt-KaHyPar, the extra `[hgpa]`, does the cut. An
edge weighs as many as the cluster has images, and costs its weight for every part it touches beyond the first [ours: of
clusters that cannot be kept whole those that are cut in two are better than those that are scattered]. Where most
clusters hold a few images of every other, as those of weak heads do, every cut costs the same: the other functions do
better there.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from icce_ray.consensus.hbgf import group_equal_images
from icce_ray.consensus.label_matrix import Heads, Labels
from icce_ray.consensus.partition import PartitionError, partition_hypergraph

MAX_PINS = 1_000_000
"""Mt-KaHyPar takes about forty microseconds for a pin (an image's label from a head): above this many HGPA is left
out."""


def hgpa(heads: Heads, num_clusters: int, *, imbalance: float, seeds: list[int]) -> list[Labels]:
    """Consensus labels (N,), 0..num_clusters-1, one vector for each seed. Parts may be empty.

    Raises:
        PartitionError: Mt-KaHyPar is not installed or failed, or the hypergraph is too large for it.
    """
    sizes_C = heads.head_cluster_sizes()
    if sizes_C.sum() > MAX_PINS:
        raise PartitionError(f"its hypergraph has {sizes_C.sum():,} pins, over the limit of {MAX_PINS:,}")
    gathered = heads.gather()
    first_G, group_N = group_equal_images(gathered)
    if len(first_G) < num_clusters:
        raise PartitionError(f"only {len(first_G)} images differ in their labels, fewer than {num_clusters} clusters")
    columns_GH = gathered.columns()[first_G]
    groups, head_index = np.nonzero(columns_GH >= 0)
    columns = columns_GH[groups, head_index]
    shape = (heads.num_head_clusters, len(first_G))
    members_CG = sp.csr_array(sp.coo_array((np.ones(len(groups), np.int8), (columns, groups)), shape=shape))
    parts = partition_hypergraph(
        members_CG,
        num_clusters,
        edge_weights=sizes_C,
        vertex_weights=np.bincount(group_N),
        imbalance=imbalance,
        seeds=seeds,
    )
    return [part[group_N] for part in parts]
