"""The score of a clustering on the neighbour graph, and the moves that raise it (docs/METHOD.md, "Recombination").

An edge leads from an image to one of its most similar neighbours and weighs the number of heads that join the two. The
weights are integers, so all sums are exact: they are the same for any parts of the images.

Shape letters: N images, n images of a part, k neighbours, H heads, K clusters, P clusterings, X cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.label_matrix import PART_LABELS, Counts, Heads, Labels, ranges

if TYPE_CHECKING:
    from icce_ray.neighbors.graph import StoredNearest

RESOLUTION = 0.6
"""Weight of the clusters' volumes in the score: the lower, the more unequal the clusters may be."""
BLOCK_IMAGES = 4096
"""Images whose moves are found at a time: their edges fit into a processor's cache."""

Shares = npt.NDArray[np.float64]
"""(K,) the share of the weight at each cluster that stays within it."""
Volumes = npt.NDArray[np.float64]
"""(..., K) the weight at each cluster, whole numbers."""
Nearest: TypeAlias = "npt.NDArray[np.integer[Any]] | StoredNearest"
"""The most similar neighbours of each image: (N, k) integers, -1 where there are fewer. Rows are read by slices."""


class Edges(NamedTuple):
    """The edges of the graph and their weights."""

    nearest: Nearest
    weights_Nk: npt.NDArray[np.uint16]

    def read(self, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
        """Neighbours (n, k) of some images, and the weights of the edges to them."""
        return neighbor_ids(self.nearest, start, stop), self.weights_Nk[start:stop]


class Moves(NamedTuple):
    """The best other cluster of each image, and by how much moving there alone raises the score."""

    target_N: Labels
    gain_N: npt.NDArray[np.float64]


class NeighborScore:
    """Scores clusterings on the graph of `nearest`, weighted by `heads`.

    With edges in both directions, m the sum of all weights and vol_k that of the edges at the images of cluster k, the
    score is the share of the weight within clusters less RESOLUTION times the sum of (vol_k / m)^2.
    """

    def __init__(self, heads: Heads, nearest: Nearest) -> None:
        self.heads = heads
        self.num_images, self.num_neighbors = (int(size) for size in nearest.shape)
        self.parts = ranges(self.num_images, max(1, PART_LABELS // self.num_neighbors))
        """(start, stop) of the images whose edges are worked on at a time."""
        self.edges = Edges(nearest, np.concatenate(list(heads.map(_weigh_part, self.parts, nearest))))
        self.degree_N = self.edges.weights_Nk.sum(axis=1, dtype=np.int64)
        for part in self.parts:
            np.add.at(self.degree_N, *self.edges.read(*part))
        self.total = int(self.degree_N.sum())

    def scores(self, clusterings: Sequence[Labels], num_clusters: int) -> list[float]:
        """The score of each clustering, with labels 0..num_clusters-1."""
        return [
            self._score(within_K.sum(), volumes_K) for within_K, volumes_K in self._within(clusterings, num_clusters)
        ]

    def shares(self, clusterings: Sequence[Labels], num_clusters: int) -> list[Shares]:
        """For each clustering, the share of the weight at each cluster that stays within it (K,); 0 for an empty
        cluster."""
        within = self._within(clusterings, num_clusters)
        return [within_K / np.maximum(volumes_K, 1) for within_K, volumes_K in within]

    def mean_shares(self, clusterings: Sequence[Labels], num_clusters: int) -> list[float]:
        """The mean of each clustering's `shares`, the same for any numbers of its clusters."""
        return [float(np.sort(shares_K).mean()) for shares_K in self.shares(clusterings, num_clusters)]

    def _within(self, clusterings: Sequence[Labels], num_clusters: int) -> Iterator[tuple[Counts, Volumes]]:
        """For each clustering, the weight within its clusters (K,), and at them (K,)."""
        labels_PN = np.stack(clusterings)
        parts = self.heads.map(_within_part, self.parts, labels_PN, num_clusters, self.edges)
        for within_K, labels_N in zip(np.sum(list(parts), axis=0), labels_PN, strict=True):
            yield within_K, self._volumes(labels_N, num_clusters)

    def measure(self, clusterings: Sequence[Labels], num_clusters: int) -> list[tuple[float, Moves]]:
        """The score of each clustering, with labels 0..num_clusters-1, and its moves."""
        labels_PN = np.stack(clusterings)
        volumes_PK = np.stack([self._volumes(labels_N, num_clusters) for labels_N in labels_PN])
        parts = list(self.heads.map(_measure_part, self.parts, labels_PN, volumes_PK, self.total, self.edges))
        within_P = np.sum([within_p for within_p, _, _ in parts], axis=0)
        targets_PN, gains_PN = (np.concatenate([part[i] for part in parts], axis=1) for i in (1, 2))
        scores = map(self._score, within_P, volumes_PK)
        return [(score, Moves(*moves)) for score, *moves in zip(scores, targets_PN, gains_PN, strict=True)]

    def _volumes(self, labels_N: Labels, num_clusters: int) -> Volumes:
        return sum_weights(labels_N, self.degree_N, num_clusters)

    def _score(self, within: int, volumes_K: Volumes) -> float:
        """Sorted volumes, so that clusterings that differ in their numbers only have equal scores."""
        total = max(self.total, 1)
        return float(within / total - RESOLUTION * ((np.sort(volumes_K) / total) ** 2).sum())

    def between(self, cells_N: Labels, num_cells: int) -> npt.NDArray[np.float64]:
        """Weight of the edges from one cell of images to another: (X, X) whole numbers, symmetric. `cells_N`: the cell
        of each image."""
        parts = self.heads.map(_count_between, self.parts, cells_N, num_cells, self.edges)
        weights_XX = sum(parts, start=np.zeros((num_cells, num_cells)))
        return weights_XX + weights_XX.T


def neighbor_ids(nearest: Nearest, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Neighbours (n, k) of some images; where there is none, the image itself."""
    ids_nk = nearest[start:stop].astype(np.int64)
    return np.where(ids_nk >= 0, ids_nk, np.arange(start, stop)[:, None])


def _weigh_part(heads: Heads, start: int, stop: int, nearest: Nearest) -> npt.NDArray[np.uint16]:
    """Number of heads (n, k) that put an image and its neighbour into one cluster; 0 where there is no neighbour."""
    ids_nk, own_n = neighbor_ids(nearest, start, stop), np.arange(start, stop)
    weights_nk = np.zeros(ids_nk.shape, dtype=np.uint16)
    for head in range(heads.num_heads):
        labels_N = heads.labels_of(head)
        labels_n1 = np.asarray(labels_N[start:stop])[:, None]
        weights_nk += (labels_N[ids_nk] == labels_n1) & (labels_n1 >= 0)
    weights_nk[ids_nk == own_n[:, None]] = 0
    return weights_nk


def _within_part(heads: Heads, start: int, stop: int, labels_PN: Labels, num_clusters: int, edges: Edges) -> Counts:
    """Weight within each cluster (P, K) of the edges of some images, in both directions."""
    ids_nk, weights_nk = edges.read(start, stop)
    within_PK = np.empty((len(labels_PN), num_clusters), dtype=np.int64)
    for within_K, labels_N in zip(within_PK, labels_PN, strict=True):
        own_n = labels_N[start:stop]
        to_own_n = (weights_nk * (labels_N[ids_nk] == own_n[:, None])).sum(axis=1)
        within_K[:] = sum_weights(own_n, to_own_n, num_clusters)
    return 2 * within_PK


def _measure_part(
    heads: Heads, start: int, stop: int, labels_PN: Labels, volumes_PK: Volumes, total: int, edges: Edges
) -> tuple[Counts, Labels, npt.NDArray[np.float64]]:
    """Weight within the clusters (P,), best other clusters (P, n) and what they gain (P, n), of some images."""
    ids_nk, weights_nk = edges.read(start, stop)
    # Neighbours first: the innermost loops run over images, of which there are more.
    ids_kn, weights_kn = np.ascontiguousarray(ids_nk.T), np.ascontiguousarray(weights_nk.T, dtype=np.int32)
    within_P = np.zeros(len(labels_PN), dtype=np.int64)
    targets_Pn = np.empty((len(labels_PN), stop - start), dtype=np.int32)
    gains_Pn = np.empty(targets_Pn.shape)
    for begin in range(0, stop - start, BLOCK_IMAGES):
        block = slice(begin, begin + BLOCK_IMAGES)
        for p, (labels_N, volumes_K) in enumerate(zip(labels_PN, volumes_PK, strict=True)):
            own_b, labels_kb = labels_N[start:stop][block], labels_N[ids_kn[:, block]]
            within, moves = _moves_of_block(own_b, labels_kb, weights_kn[:, block], volumes_K, max(total, 1))
            within_P[p] += within
            targets_Pn[p, block], gains_Pn[p, block] = moves
    return within_P, targets_Pn, gains_Pn


def _moves_of_block(
    own_b: Labels, labels_kb: Labels, weights_kb: npt.NDArray[np.int32], volumes_K: Volumes, total: int
) -> tuple[int, Moves]:
    """Weight within the clusters of the edges of some images, and their moves, from the clusters of the images and of
    their neighbours, and the weights of the edges to them. `volumes_K` and `total` are the weights of the edges at the
    images of each cluster, and at all images."""
    # An image's edges to its neighbours stand for those that lead to it too, which other parts hold.
    degree_b = 2 * weights_kb.sum(axis=0, dtype=np.int32)
    to_own_b = (weights_kb * (labels_kb == own_b)).sum(axis=0, dtype=np.int32)
    staying_b = 2 * to_own_b - RESOLUTION * degree_b * ((volumes_K[own_b] - degree_b) / total)
    shares_K = RESOLUTION * volumes_K / total
    best_b, target_b = np.full(len(own_b), -np.inf), own_b.copy()
    for labels_b in labels_kb:
        to_b = (weights_kb * (labels_kb == labels_b)).sum(axis=0, dtype=np.int32)
        value_b = 2 * to_b - degree_b * shares_K[labels_b]
        is_better_b = (value_b > best_b) & (labels_b != own_b)
        np.copyto(best_b, value_b, where=is_better_b)
        np.copyto(target_b, labels_b, where=is_better_b)
    return 2 * int(to_own_b.sum(dtype=np.int64)), Moves(target_b, best_b - staying_b)


def _count_between(
    heads: Heads, start: int, stop: int, cells_N: Labels, num_cells: int, edges: Edges
) -> npt.NDArray[np.float64]:
    ids_nk, weights_nk = edges.read(start, stop)
    pairs_nk = cells_N[start:stop, None].astype(np.int64) * num_cells + cells_N[ids_nk]
    weights = sum_weights(pairs_nk.ravel(), weights_nk.ravel(), num_cells**2)
    return weights.reshape(num_cells, num_cells)


def sum_weights(groups_N: npt.NDArray[Any], weights_N: npt.NDArray[Any], num_groups: int) -> npt.NDArray[np.float64]:
    """Sum of the integers `weights_N` in each group (num_groups,); exact below 2^53."""
    sums: npt.NDArray[Any] = np.bincount(groups_N, weights=weights_N, minlength=num_groups)
    return sums
