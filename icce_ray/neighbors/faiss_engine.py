"""The part of a search that touches every pair: queries against one shard's images, on a CPU by FAISS.

An engine's scores may be wrong by `error`; whoever uses them scores again what stands closer to a border than that. So
every engine, on any device, leads to the same neighbours. `icce_ray.neighbors.torch_engine` is the one for GPUs.

Legend: D feature dimension, n images of the shard, Q queries, P pairs, k list length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import faiss
import numpy as np
import numpy.typing as npt

from icce_ray.neighbors.rule import PairList, Rule, rank_in_row
from icce_ray.neighbors.unit_features import Floats, Ids, PreparedFeatures, Queries

RESOLUTION = 2.0**-22
"""Similarities are compared in these units: closer is a tie, and the lower id wins."""
BASE_BLOCK = 16_384
RESCORED_ELEMENTS = 4_000_000
MIN_BLOCK = 1024
NUM_BLOCKS = 16
"""Of a shard, at least, where they would not be smaller than `MIN_BLOCK`."""
TIGHTENED_AFTER = frozenset({3, 9, 27, 81, 243})
"""So many blocks. Each time a third of the pairs that were let through before would be now."""

NOTHING = 2.0
"""A radius that no score reaches; all reach -2."""

ScoredPairs = tuple[npt.NDArray[np.int32], Ids, Floats]
"""Of P pairs: number of the query (ascending), image, score."""


class Engine(Protocol):
    """Searches the images of one shard."""

    ids_n: Ids
    """The shard's images, ascending."""
    blocks_at_once: int
    """How many blocks of queries to search at the same time, each in a thread."""
    error: float
    """Bound on what a score differs by from the cosine, `RESOLUTION` included."""

    def pairs(self, queries: Queries, rule: Rule) -> Iterator[PairList]:
        """Pairs of the queries and the shard's images, each at most once, some at a time: all that the rule may keep,
        all that reach its threshold, and all near-duplicates. Of queries that `is_unsearched` names there are none."""

    def exact(self, queries: Queries, rows_P: npt.NDArray[np.int32], ids_P: Ids) -> Ids:
        """Cosine of each pair in units of `RESOLUTION`, from float64 products: (P,) int64."""


def is_unsearched(queries: Queries, rule: Rule, error: float) -> npt.NDArray[np.bool_]:
    """(Q,) the zero vectors, where the threshold is above 0: all images are equally far from them, and none is near."""
    if rule.threshold is None or rule.threshold > error:
        return queries.is_zero
    return np.zeros(len(queries), bool)


def lowest_border(rule: Rule, error: float) -> float:
    """The score from which on every pair counts, whatever else is in its row; infinite without a threshold."""
    borders = [border for border in (rule.threshold, rule.duplicate_threshold) if border is not None]
    return min(borders, default=np.inf) - error


def radius(kth_Q: Floats, border: float, unsearched_Q: npt.NDArray[np.bool_], error: float) -> Floats:
    """(Q,) the scores from which on pairs are worth keeping, given scores that as many images reach as are wanted: -inf
    where so many are not known."""
    radius_Q: Floats = np.clip(kth_Q - 2 * error, -NOTHING, min(border, NOTHING)).astype(np.float32)
    radius_Q[unsearched_Q] = NOTHING
    return radius_Q


def similarity_error(dim: int) -> float:
    """Bound on the error of a float32 inner product of unit vectors less a radius, the resolution added."""
    return (dim + 2) * 2.0**-23 + 2 * RESOLUTION


def in_units(cosine: float) -> int:
    return round(cosine / RESOLUTION)


def exact_similarity(
    queries_QD: Floats, rows_P: npt.NDArray[np.int32], base: Floats | PreparedFeatures, columns_P: Ids
) -> Ids:
    """Cosine of each pair of a query and a row of `base`, in units of `RESOLUTION`: (P,) int64."""
    units_P = np.empty(len(rows_P), np.int64)
    step = max(1, RESCORED_ELEMENTS // base.shape[1])
    for start in range(0, len(rows_P), step):
        chunk = slice(start, start + step)
        left = queries_QD[rows_P[chunk]].astype(np.float64)
        left *= base[columns_P[chunk]]
        units_P[chunk] = np.rint(left.sum(axis=1) / RESOLUTION)
    return units_P


class FaissEngine(Engine):
    """Holds the rows of a shard in float32, and a column of ones: with minus the radius beside a query, one range
    search serves queries of different radii.

    A block holds every so many-th image. So each is a sample of the shard, however that is sorted: the first tells from
    which score on the others are worth a look, and what they add tells it better.

    Args:
        prepared: the features of all images.
        ids_n: the shard's images, ascending.
    """

    blocks_at_once = 1  # FAISS has threads of its own

    def __init__(self, prepared: PreparedFeatures, ids_n: Ids) -> None:
        num_images, dim = len(ids_n), prepared.shape[1]
        self.ids_n = ids_n
        self.error = similarity_error(dim)
        num_blocks = max(1, -(-num_images // BASE_BLOCK), min(NUM_BLOCKS, num_images // MIN_BLOCK))
        columns_of_blocks = [np.arange(first, num_images, num_blocks) for first in range(num_blocks)]
        columns_n = np.concatenate(columns_of_blocks)
        self._row_of_column_n = np.empty(num_images, np.int64)
        self._row_of_column_n[columns_n] = np.arange(num_images)
        self._ids_of_rows_n = ids_n[columns_n]
        lengths = list(map(len, columns_of_blocks))
        self._blocks = [slice(stop - length, stop) for length, stop in zip(lengths, np.cumsum(lengths), strict=True)]
        self._rows_nE = np.empty((num_images, dim + 1), np.float32)
        self._rows_nE[:, dim] = 1.0
        for start in range(0, num_images, BASE_BLOCK):
            columns = slice(start, start + BASE_BLOCK)
            self._rows_nE[self._row_of_column_n[columns], :dim] = prepared[as_slice(ids_n[columns])]

    def pairs(self, queries: Queries, rule: Rule) -> Iterator[PairList]:
        k = rule.min_neighbors + 1  # the image itself may be among them
        unsearched_Q, border = is_unsearched(queries, rule, self.error), lowest_border(rule, self.error)
        first_Qb = self._first_scores(queries.features)
        radii = _Radii(first_Qb, k, border, unsearched_Q, self.error)
        rows, columns_P = np.nonzero(first_Qb >= radii.radius_Q[:, None])
        scores_P, rows_P = first_Qb[rows, columns_P], rows.astype(np.int32)
        del first_Qb, rows
        yield self._pair_list(queries, rule, rows_P, self._ids_of_rows_n[columns_P], scores_P)
        queries_QE = np.column_stack([queries.features, np.empty(len(queries), np.float32)])
        last_tightened = max((number for number in TIGHTENED_AFTER if number < len(self._blocks)), default=0)
        for number, block in enumerate(self._blocks[1:], 2):
            queries_QE[:, -1] = -radii.radius_Q
            rows_P, columns_P, scores_P = self._above(queries_QE, block)
            if number <= last_tightened:
                radii.learn(rows_P, scores_P)
                if number in TIGHTENED_AFTER:
                    radii.tighten()
            yield self._pair_list(queries, rule, rows_P, self._ids_of_rows_n[block.start + columns_P], scores_P)

    def exact(self, queries: Queries, rows_P: npt.NDArray[np.int32], ids_P: Ids) -> Ids:
        base_rows_P = self._row_of_column_n[np.searchsorted(self.ids_n, ids_P)]
        return exact_similarity(queries.features, rows_P, self._rows_nE[:, :-1], base_rows_P)

    def _pair_list(
        self, queries: Queries, rule: Rule, rows_P: npt.NDArray[np.int32], ids_P: Ids, scores_P: Floats
    ) -> PairList:
        """Of scored pairs those that may be neighbours, and which of them reach the threshold."""
        other_P = np.flatnonzero(ids_P != queries.excluded_Q[rows_P])
        if len(other_P) < len(rows_P):
            rows_P, ids_P, scores_P = rows_P[other_P], ids_P[other_P], scores_P[other_P]
        is_hit_P = np.zeros(len(rows_P), bool)
        if rule.threshold is not None:
            np.greater_equal(scores_P, rule.threshold, out=is_hit_P)
            close_P = np.flatnonzero(np.abs(scores_P - rule.threshold) <= self.error)
            is_hit_P[close_P] = self.exact(queries, rows_P[close_P], ids_P[close_P]) >= in_units(rule.threshold)
        return PairList(rows_P, ids_P, scores_P, is_hit_P)

    def _first_scores(self, queries_QD: Floats) -> Floats:
        """Of the images of the first block."""
        scores_Qb: Floats = queries_QD @ self._rows_nE[self._blocks[0], :-1].T
        return scores_Qb

    def _above(self, queries_QE: Floats, block: slice) -> ScoredPairs:
        """All pairs with a score of at least the query's radius; the images by their place in the block."""
        lengths_Q, above_P, columns_P = _range_search(queries_QE, self._rows_nE[block])
        rows_P = np.repeat(np.arange(len(queries_QE), dtype=np.int32), lengths_Q)
        above_P -= queries_QE[rows_P, -1]
        return rows_P, columns_P, above_P


class _Radii:
    """The score that a pair must reach to be worth keeping, for each query, from what is known of its k-th highest.

    Args:
        first_QB: scores of some images.
        k: list length.
        border, unsearched_Q, error: as for `radius`.
    """

    def __init__(
        self, first_QB: Floats, k: int, border: float, unsearched_Q: npt.NDArray[np.bool_], error: float
    ) -> None:
        self.k = k
        self.border = border
        self.unsearched_Q = unsearched_Q
        self.error = error
        # There may be fewer than k.
        self._scores = [first_QB, np.full((len(first_QB), max(0, k - first_QB.shape[1])), -np.inf, np.float32)]
        self.tighten()

    def learn(self, rows_P: npt.NDArray[np.int32], scores_P: Floats) -> None:
        """There are these pairs; rows ascend."""
        open_P = np.flatnonzero(self.is_open_Q[rows_P])
        rows_P, ranks_P = rows_P[open_P], rank_in_row(rows_P[open_P])
        scores_QB = np.full((len(self.is_open_Q), int(ranks_P.max(initial=-1)) + 1), -np.inf, np.float32)
        scores_QB[rows_P, ranks_P] = scores_P[open_P]
        self._scores.append(scores_QB)

    def tighten(self) -> None:
        """Use what was learnt."""
        best_Qk = np.partition(np.hstack(self._scores), -self.k, axis=1)[:, -self.k :]
        self._scores = [best_Qk]
        self.radius_Q = radius(best_Qk[:, 0], self.border, self.unsearched_Q, self.error)
        self.is_open_Q = self.radius_Q < np.float32(min(self.border, NOTHING))


def as_slice(ids_n: Ids) -> slice | Ids:
    """Consecutive ids as a slice: a memory map then reads them as one run."""
    is_run = int(ids_n[-1] - ids_n[0]) == len(ids_n) - 1
    return slice(int(ids_n[0]), int(ids_n[-1]) + 1) if is_run else ids_n


def _range_search(queries_QE: Floats, block_BE: Floats) -> tuple[Ids, Floats, Ids]:
    """Hits per query (Q,), and of all hits, query after query, the inner product (above 0) and the row of the block."""
    num_queries, dim = queries_QE.shape
    result = faiss.RangeSearchResult(num_queries)
    query_pointer, base_pointer = faiss.swig_ptr(queries_QE), faiss.swig_ptr(block_BE)
    faiss.range_search_inner_product(query_pointer, base_pointer, dim, num_queries, len(block_BE), 0.0, result)
    limits = faiss.rev_swig_ptr(result.lims, num_queries + 1).astype(np.int64)
    if limits[-1] == 0:
        return np.diff(limits), np.empty(0, np.float32), np.empty(0, np.int64)
    above_P = faiss.rev_swig_ptr(result.distances, int(limits[-1])).copy()
    columns_P = faiss.rev_swig_ptr(result.labels, int(limits[-1])).astype(np.int64)
    return np.diff(limits), above_P, columns_P
