"""The neighbour graph judges recombinations of the heads and of their consensus (docs/METHOD.md, "Recombination").

The overlay of two clusterings has a cell for each pair of their clusters. Its cells are merged until K are left, so
that the score on the graph falls least, and single images are moved as long as it rises. The clusterings with the best
scores are overlaid with each other, once: a second round changed nothing for the better.

Shape letters: N images, K clusters, X cells.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from math import comb

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.best_merges import best_merges
from icce_ray.consensus.label_matrix import Labels, hash_numbers
from icce_ray.consensus.neighbor_score import RESOLUTION, Moves, NeighborScore, sum_weights
from icce_ray.consensus.refinement import leave_no_cluster_empty

MAX_POPULATION, MIN_POPULATION = 10, 4
"""Number of clusterings that are overlaid with each other."""
OVERLAY_BUDGET = 30_000_000
"""Number of edges times overlays, about: large inputs get a smaller population."""
MAX_CELLS = 1024
"""Cells of an overlay that are merged, or twice the number of clusters if that is more."""
MAX_CLUSTERS = 2000
"""The work on the cells grows with the square of the number of clusters."""
MAX_PASSES = 12
"""Passes of a polish."""
MOVED_SHARE = 0.6
"""Share of the wanted moves that are made at a time: neighbours that swap their clusters gain nothing."""
BATCH_IMAGES = 1 << 24
"""Images times clusterings that are measured at a time."""


@dataclass(frozen=True)
class Scored:
    """A clustering and its score."""

    labels_N: Labels
    score: float


def recombine(score: NeighborScore, consensuses: Sequence[Labels], num_clusters: int, *, seed: int) -> Scored:
    """The clustering with the best score, made of the heads and of their consensuses (N,), 0..K-1. All results use as
    many clusters as the first. Heads that leave out images count in the weights of the edges only."""
    limit = population_size(score.num_images * score.num_neighbors)
    num_used = len(np.unique(consensuses[0]))
    found: list[Scored] = []
    for batch in _batches(_starts(score, consensuses, num_clusters), score):
        found += map(Scored, batch, score.scores(batch, num_clusters))
        found = _best(found, 2 * limit)
    starts = [consensuses[0]]
    for labels_N in (one.labels_N for one in found):
        if len(np.unique(labels_N)) < num_used:
            labels_N = overlay(score, labels_N, consensuses[0], num_clusters)
        if len(np.unique(labels_N)) == num_used:
            starts.append(labels_N)
    found = polish(score, starts, num_clusters, seed=seed)
    found = _best(found, limit)
    pairs = [(one.labels_N, other.labels_N) for one, other in combinations(found, 2)]
    overlays = (overlay(score, *pair, num_clusters) for pair in pairs)
    return _best([*found, *polish(score, overlays, num_clusters, seed=seed)], 1)[0]


def _starts(score: NeighborScore, consensuses: Sequence[Labels], num_clusters: int) -> Iterator[Labels]:
    """The consensuses, and the heads with at most `num_clusters` clusters each: more are merged."""
    yield from consensuses
    heads = score.heads
    for head, num_codes in enumerate(heads.num_clusters.tolist()):
        codes_N = heads.codes_of(head)
        if codes_N.min() < 0:
            continue
        if num_codes > num_clusters:
            codes_N = merge_cells(score, codes_N, num_codes, num_clusters)
        yield codes_N


def population_size(num_edges: int) -> int:
    """Number of clusterings that are overlaid with each other."""
    size = MAX_POPULATION
    while size > MIN_POPULATION and comb(size, 2) * num_edges > OVERLAY_BUDGET:
        size -= 1
    return size


def _best(found: list[Scored], limit: int) -> list[Scored]:
    """The best ones, one of each score."""
    distinct = {round(one.score, 6): one for one in reversed(found)}
    return sorted(distinct.values(), key=lambda one: -one.score)[:limit]


def _batches(clusterings: Iterable[Labels], score: NeighborScore) -> Iterator[list[Labels]]:
    remaining, size = iter(clusterings), max(1, BATCH_IMAGES // score.num_images)
    while batch := list(islice(remaining, size)):
        yield batch


def polish(score: NeighborScore, starts: Iterable[Labels], num_clusters: int, *, seed: int) -> list[Scored]:
    """Move images of each clustering for as long as that raises its score. No cluster is emptied."""
    return [found for batch in _batches(starts, score) for found in _polish_batch(score, batch, num_clusters, seed)]


class _Polished:
    """A clustering on its way: the best labels so far, and the labels that are tried next."""

    def __init__(self, labels_N: Labels, num_clusters: int) -> None:
        self.best = Scored(labels_N, -np.inf)
        self.tried_N: Labels | None = labels_N
        self._num_clusters = num_clusters
        self._fewer: npt.NDArray[np.int64] | None = None
        """Movers for a second try, if the first lowered the score."""

    def learn(self, score: float, moves: Moves, chosen_N: npt.NDArray[np.bool_]) -> None:
        """Take the score and the moves of the labels that were tried, and choose the next."""
        assert self.tried_N is not None
        if score > self.best.score:
            self.best, self._moves = Scored(self.tried_N, score), moves
            wanted = np.flatnonzero(moves.gain_N > 0)
            most = wanted[np.argsort(-moves.gain_N[wanted], kind="stable")]
            movers, self._fewer = wanted[chosen_N[wanted]], most[: -(-len(most) // 4)]
        elif self._fewer is not None:
            movers, self._fewer = self._fewer, None
        else:
            movers = np.empty(0, dtype=np.int64)
        movers = leave_no_cluster_empty(movers, self.best.labels_N, self._num_clusters)
        self.tried_N = None
        if len(movers):
            self.tried_N = self.best.labels_N.copy()
            self.tried_N[movers] = self._moves.target_N[movers]


def _polish_batch(score: NeighborScore, starts: Sequence[Labels], num_clusters: int, seed: int) -> list[Scored]:
    polished = [_Polished(labels_N, num_clusters) for labels_N in starts]
    images_N = np.arange(score.num_images)
    for number in range(MAX_PASSES):
        active = [(one, one.tried_N) for one in polished if one.tried_N is not None]
        if not active:
            break
        hashes_N = hash_numbers(images_N, np.full_like(images_N, number), seed)
        chosen_N = hashes_N < np.uint64(MOVED_SHARE * 2**64)
        measured = score.measure([tried_N for _, tried_N in active], num_clusters)
        for (one, _), (value, moves) in zip(active, measured, strict=True):
            one.learn(value, moves, chosen_N)
    return [one.best for one in polished]


def overlay(score: NeighborScore, one_N: Labels, other_N: Labels, num_clusters: int) -> Labels:
    """The overlay of two clusterings, merged down to `num_clusters`."""
    keys_N = one_N.astype(np.int64) * num_clusters + other_N
    keys_X, cells_N = np.unique(keys_N, return_inverse=True)
    volumes_X = sum_weights(cells_N, score.degree_N, len(keys_X))
    cell_X = _join_light_cells(keys_X, volumes_X, num_clusters)
    return merge_cells(score, cell_X[cells_N], int(cell_X.max()) + 1, num_clusters)


def _join_light_cells(keys_X: npt.NDArray[np.int64], volumes_X: npt.NDArray[np.float64], num_clusters: int) -> Labels:
    """Cell (X,) that each cell of an overlay joins. The heaviest stay, up to a limit; each other one joins the heaviest
    that stays in the same cluster of the first clustering, or else the heaviest of all: the polish moves its images."""
    order = np.argsort(-volumes_X, kind="stable")[: max(MAX_CELLS, 2 * num_clusters)]
    clusters, firsts = np.unique(keys_X[order] // num_clusters, return_index=True)
    heaviest_K = np.zeros(num_clusters, dtype=np.int32)
    heaviest_K[clusters] = firsts
    cell_X = heaviest_K[keys_X // num_clusters]
    cell_X[order] = np.arange(len(order))
    return cell_X


def merge_cells(score: NeighborScore, cells_N: Labels, num_cells: int, num_clusters: int) -> Labels:
    """Merge the cells 0..num_cells-1 of images, two at a time, so that the score falls least, until `num_clusters` are
    left; these are numbered in the order of their lowest cells."""
    weights_XX = score.between(cells_N, num_cells)
    volumes_X, holder_X = weights_XX.sum(axis=1), np.arange(num_cells)
    cost = RESOLUTION / max(volumes_X.sum(), 1.0)

    def gains(low: int, high: int, others: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        weights_XX[low] += weights_XX[high]
        weights_XX[:, low] += weights_XX[:, high]
        volumes_X[low] += volumes_X[high]
        return np.asarray(weights_XX[low, others] - cost * volumes_X[low] * volumes_X[others])

    gains_XX = weights_XX - cost * np.outer(volumes_X, volumes_X)
    for low, high, _ in best_merges(gains_XX, num_cells - num_clusters, gains):
        holder_X[holder_X == high] = low
    return np.unique(holder_X, return_inverse=True)[1].astype(np.int32)[cells_N]
