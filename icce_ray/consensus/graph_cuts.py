"""The consensus functions that cut a graph with METIS: MCLA, HBGF and CSPA (docs/METHOD.md, "Consensus").

MCLA (Strehl & Ghosh 2002): the vertices are the clusters of all heads, and edges weigh how much two of them overlap
(Jaccard). Each image goes to the part that its clusters are associated with most. The graph comes from contingency
counts and the vote is made image by image, so it works for any number of images. The counts of every pair of heads also
give their NMI with one another. The unit of work is a tile of pairs of heads over all images: the table of one pair is
small, those of all pairs are not. A billion images of one pair take a few seconds.

HBGF (Fern & Brodley, ICML 2004): the bipartite graph of images and head clusters. CSPA (Strehl & Ghosh 2002): the
co-association matrix of the images, whose size grows with N x N. In both, images that all heads label alike are one
vertex with the weight of all.

Each returns labels (N,), 0..num_clusters-1, for each seed. Clusters may be empty. Raises PartitionError: METIS failed,
or the graph is too large for it.

Shape letters: N images, H heads, C head clusters, G groups of images.
"""

from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from icce_ray.consensus import label_matrix
from icce_ray.consensus.aligned_vote import vote
from icce_ray.consensus.label_matrix import Counts, HeadLabels, Heads, Labels, group_equal_images
from icce_ray.consensus.partition import PartitionError, partition_graph
from icce_ray.metrics.contingency import Table, count_table, nmi_from_counts

MCLA_MAX_EDGES = 50_000_000
"""If more pairs of clusters overlap, MCLA is left out: METIS needs about 100 bytes for each."""
HBGF_MAX_EDGES = 3_000_000
"""If there are more edges (labels), HBGF is left out: METIS takes about two microseconds and 100 bytes for each, and
its cuts of large graphs are poor."""
CSPA_MAX_IMAGES = 5_000
CSPA_MAX_WEIGHT = 1e6
"""Larger edge weights are scaled down, to stay within METIS's 32-bit integers."""
MAX_FULL_CLUSTERS = 2000
MIN_JACCARD = 0.01
"""If there are more head clusters than MAX_FULL_CLUSTERS, pairs that overlap less get no edge: these are most of the
pairs, and chance overlaps."""
JACCARD_SCALE = 1000
"""METIS takes integer edge weights: thousandths of the Jaccard similarity."""
MAX_TILE_HEADS, MAX_TILE_CELLS = 5, 1 << 25
"""Heads on a side of a tile, and cells of its tables (256 MB)."""


Overlaps = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]
"""Clusters of one head, those of another that they overlap with, and their Jaccard similarities in thousandths."""


@dataclass(frozen=True)
class HeadPairs:
    """Result of comparing all pairs of heads."""

    nmi_HH: npt.NDArray[np.float64]
    """NMI (geometric) of every pair of heads."""
    overlaps: sp.coo_array
    """(C, C) int32, the upper triangle: Jaccard similarities of head clusters, in thousandths."""

    def anmi(self) -> npt.NDArray[np.float64]:
        """Average NMI of each head with all heads (H,)."""
        anmi_H: npt.NDArray[np.float64] = self.nmi_HH.mean(axis=1)
        return anmi_H

    def cluster_graph(self) -> sp.csr_array:
        """The graph of the head clusters: both triangles of `overlaps`."""
        upper = sp.csr_array(self.overlaps)
        return sp.csr_array(upper + upper.T)


def compare_heads(heads: Heads) -> HeadPairs:
    """Count every pair of heads."""
    sizes_C = heads.head_cluster_sizes()
    min_jaccard = MIN_JACCARD if heads.num_head_clusters > MAX_FULL_CLUSTERS else 0.5 / JACCARD_SCALE
    nmi_HH = np.eye(heads.num_heads)
    overlaps: list[Overlaps] = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int32))]
    for pairs, nmi, found in heads.map(_compare_tile, _tiles(heads), sizes_C, min_jaccard):
        for (g, h), value in zip(pairs, nmi, strict=True):
            nmi_HH[g, h] = nmi_HH[h, g] = value
        overlaps += found
    rows, columns, weights = map(np.concatenate, zip(*overlaps, strict=True))
    return HeadPairs(nmi_HH, sp.coo_array((weights, (rows, columns)), shape=(heads.num_head_clusters,) * 2))


def tile_heads(num_clusters_H: Counts) -> int:
    """Number of heads on a side of a tile, so that its tables fit."""
    return max(1, min(MAX_TILE_HEADS, isqrt(MAX_TILE_CELLS // int(num_clusters_H.max()) ** 2)))


def _tiles(heads: Heads) -> list[tuple[int, int, int, int]]:
    """(first, end, first, end) of the heads g and h of each tile, for the pairs g < h."""
    side = tile_heads(heads.num_clusters)
    starts = range(0, heads.num_heads, side)
    sides = [(start, min(start + side, heads.num_heads)) for start in starts]
    return [(*one, *other) for i, one in enumerate(sides) for other in sides[i:] if other[1] - one[0] > 1]


def _compare_tile(
    heads: Heads, first_g: int, end_g: int, first_h: int, end_h: int, sizes_C: Counts, min_jaccard: float
) -> tuple[list[tuple[int, int]], list[float], list[Overlaps]]:
    """The pairs of heads of a tile, their NMI, and their overlaps."""
    pairs = [(g, h) for g in range(first_g, end_g) for h in range(max(first_h, g + 1), end_h)]
    clusters, offsets = heads.num_clusters, heads.offsets
    tables: dict[tuple[int, int], Table] = {}
    for start in range(0, heads.num_images, label_matrix.PART_LABELS):
        stop = min(start + label_matrix.PART_LABELS, heads.num_images)
        codes_g = heads.read(start, stop, slice(first_g, end_g)).codes
        codes_h = heads.read(start, stop, slice(first_h, end_h)).codes
        for g, h in pairs:
            table = count_table(codes_g[g - first_g], codes_h[h - first_h], int(clusters[g]), int(clusters[h]))
            tables[g, h] = tables[g, h] + table if (g, h) in tables else table
    nmi = [nmi_from_counts(tables[pair]) for pair in pairs]
    overlaps = []
    for g, h in pairs:
        sizes_g, sizes_h = (sizes_C[offsets[head] : offsets[head + 1]] for head in (g, h))
        rows, columns, weights = _overlaps(tables[g, h], sizes_g, sizes_h, min_jaccard)
        overlaps.append((rows + offsets[g], columns + offsets[h], weights))
    return pairs, nmi, overlaps


def _overlaps(table: Table, sizes_g: Counts, sizes_h: Counts, min_jaccard: float) -> Overlaps:
    """The cells whose Jaccard similarity, images in both over images in either, is at least `min_jaccard`."""
    if isinstance(table, np.ndarray):
        # A bound for all cells of a row, quick to check: no cluster of h is smaller than the smallest.
        least = np.ceil(min_jaccard / (1 + min_jaccard) * (sizes_g + sizes_h.min()) - 1e-6)
        cells = np.flatnonzero(table >= np.maximum(least, 1).astype(np.int64)[:, None])
        rows, columns = np.divmod(cells, table.shape[1])
        counts: npt.NDArray[Any] = table.ravel()[cells]
    else:
        coo = table.tocoo()
        (rows, columns), counts = coo.coords, coo.data
    jaccard = counts / (sizes_g[rows] + sizes_h[columns] - counts)
    kept = jaccard >= min_jaccard
    weights = np.maximum(np.rint(jaccard[kept] * JACCARD_SCALE), 1).astype(np.int32)
    return rows[kept].astype(np.int64), columns[kept].astype(np.int64), weights


def mcla(heads: Heads, pairs: HeadPairs, num_clusters: int, *, imbalance: float, seeds: list[int]) -> list[Labels]:
    """There are two results for each seed. METIS balances the weights of the parts, and a head cluster weighs its
    images (Strehl & Ghosh) or 1. With equal weights, a meta-cluster gets about one cluster of each head, however large,
    which suits unbalanced data: planted power-law clusters are recovered exactly, against two thirds of them."""
    if heads.num_head_clusters <= num_clusters:
        return [vote(heads, np.arange(heads.num_head_clusters), num_clusters, seed=seeds[0], by_mean=True)]
    num_edges = pairs.overlaps.nnz
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
