"""Contingency counts of every pair of heads: the overlaps of their clusters, from which MCLA makes its graph, and the
NMI of the heads with one another.

The unit of work is a tile of pairs of heads over all images: the table of one pair is small, those of all pairs are
not. A billion images of one pair take a few seconds.

Shape letters: N images, H heads, C head clusters.
"""

from dataclasses import dataclass
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from icce_ray.consensus import label_matrix
from icce_ray.consensus.label_matrix import Counts, Heads
from icce_ray.metrics.contingency import Table, count_table, nmi_from_counts

MAX_FULL_CLUSTERS = 2000
MIN_JACCARD = 0.01
"""If there are more head clusters than MAX_FULL_CLUSTERS, pairs that overlap less get no edge: these are most of the
pairs, and chance overlaps."""
JACCARD_SCALE = 1000
"""METIS takes integer edge weights: thousandths of the Jaccard similarity."""
MAX_TILE_HEADS, MAX_TILE_CELLS = 5, 1 << 25
"""Heads on a side of a tile, and cells of its tables (256 MB)."""


class Edges(NamedTuple):
    """Pairs of head clusters g < h that overlap: head cluster, head cluster, Jaccard similarity in thousandths."""

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int32]


@dataclass(frozen=True)
class HeadPairs:
    """Result of comparing all pairs of heads."""

    nmi_HH: npt.NDArray[np.float64]
    """NMI (geometric) of every pair of heads."""
    edges: Edges
    """The edges of the graph of the head clusters."""
    offsets: Counts

    def anmi(self) -> npt.NDArray[np.float64]:
        """Average NMI of each head with all heads (H,)."""
        anmi_H: npt.NDArray[np.float64] = self.nmi_HH.mean(axis=1)
        return anmi_H

    def cluster_graph(self) -> sp.csr_array:
        """The graph of the head clusters: (C, C) symmetric int32, Jaccard similarities in thousandths."""
        shape = (int(self.offsets[-1]),) * 2
        upper = sp.csr_array(sp.coo_array((self.edges.weights, (self.edges.rows, self.edges.columns)), shape=shape))
        return sp.csr_array(upper + upper.T)


def compare_heads(heads: Heads) -> HeadPairs:
    """Count every pair of heads."""
    sizes_C = heads.head_cluster_sizes()
    min_jaccard = MIN_JACCARD if heads.num_head_clusters > MAX_FULL_CLUSTERS else 0.5 / JACCARD_SCALE
    nmi_HH = np.eye(heads.num_heads)
    edges: list[Edges] = []
    for pairs, nmi, found in heads.map(_compare_tile, _tiles(heads), sizes_C, min_jaccard):
        for (g, h), value in zip(pairs, nmi, strict=True):
            nmi_HH[g, h] = nmi_HH[h, g] = value
        edges += found
    empty = Edges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int32))
    return HeadPairs(nmi_HH, Edges(*map(np.concatenate, zip(empty, *edges, strict=True))), heads.offsets)


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
) -> tuple[list[tuple[int, int]], list[float], list[Edges]]:
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
    edges = []
    for g, h in pairs:
        sizes = [sizes_C[offsets[head] : offsets[head + 1]] for head in (g, h)]
        rows, columns, weights = _overlaps(tables[g, h], sizes[0], sizes[1], min_jaccard)
        edges.append(Edges(rows + offsets[g], columns + offsets[h], weights))
    return pairs, nmi, edges


def _overlaps(table: Table, sizes_g: Counts, sizes_h: Counts, min_jaccard: float) -> Edges:
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
    return Edges(rows[kept].astype(np.int64), columns[kept].astype(np.int64), weights)
