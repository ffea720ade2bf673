"""The part of a search that touches every pair: queries against the images of one shard, on a CPU by FAISS.

The scores of an engine may be wrong by up to its `error`; pairs closer to a border than that are scored again. So every
engine on any device leads to the same neighbours. `icce_ray.neighbors.torch_engine` has the one for GPUs.

Legend: D feature dimension, n images of the shard, Q queries, B images of a block, P pairs, k list length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from icce_ray.neighbors.adaptive_rule import PairList, Rule, rank_in_row
from icce_ray.sample.range_search import range_search
from icce_ray.sample.unit_features import RESOLUTION, Floats, Ids, UnitFeatures, exact_similarity, in_units

BASE_BLOCK = 16_384
MIN_BLOCK = 1024
NUM_BLOCKS = 16
"""Least number of blocks of a shard, unless they would be smaller than `MIN_BLOCK`."""
TIGHTENED_AFTER = frozenset({3, 9, 27, 81, 243})
"""Numbers of blocks after which the radii are recomputed: each time, about a third of the pairs remain."""

UNREACHABLE = 2.0
"""A radius that no score reaches; every score reaches -2."""


@dataclass(frozen=True)
class Queries:
    """Q images whose neighbours are wanted, by their rows in the features of all images."""

    unit: UnitFeatures
    ids_Q: Ids

    def __len__(self) -> int:
        return len(self.ids_Q)

    @cached_property
    def features(self) -> Floats:
        """(Q, D). Prepared on first use, since most answers are merged without it."""
        return self.unit[self.ids_Q]

    def unsearched(self, rule: Rule, error: float) -> npt.NDArray[np.bool_]:
        """(Q,) the zero vectors, if the threshold is above 0: all images are equally far from them, none is near."""
        if rule.threshold is not None and rule.threshold <= error:
            return np.zeros(len(self), bool)
        return np.logical_not(self.features.any(axis=1))

    def exact(self, rows_P: npt.NDArray[np.int32], ids_P: Ids) -> Ids:
        """Cosine of each pair of a query and any image, as :meth:`Engine.exact`."""
        return exact_similarity(self.features, rows_P, self.unit, ids_P)


class Engine(Protocol):
    """Searches the images of one shard."""

    ids_n: Ids
    """The shard's images, ascending."""
    blocks_at_once: int
    """Number of blocks of queries to search at the same time, each in a thread of its own."""
    error: float
    """Bound on the difference between a score and the cosine, `RESOLUTION` included."""

    def pairs(self, queries: Queries, rule: Rule) -> Iterator[PairList]:
        """Pairs of the queries and the shard's images, each at most once, some at a time: all that the rule may keep
        and all that reach its threshold. There are none of queries that `Queries.unsearched` names."""

    def exact(self, queries: Queries, rows_P: npt.NDArray[np.int32], ids_P: Ids) -> Ids:
        """Cosine of each pair in units of `RESOLUTION`, from float64 products: (P,) int64."""


def always_wanted(rule: Rule, error: float) -> float:
    """The score from which on a pair is kept regardless of the rest of its row; `UNREACHABLE` without a threshold."""
    return UNREACHABLE if rule.threshold is None else min(rule.threshold - error, UNREACHABLE)


class FaissEngine(Engine):
    """Holds the rows of a shard in float32, with a column of ones: if the queries have minus their radius there, one
    range search serves queries of different radii.

    A block holds every m-th image, so each is a sample of the shard even if the images are sorted. The first block
    bounds the scores that can matter in the others, and later blocks tighten the bound.

    Args:
        unit: the features of all images.
        ids_n: the shard's images, ascending.
    """

    blocks_at_once = 1  # FAISS has threads of its own

    def __init__(self, unit: UnitFeatures, ids_n: Ids) -> None:
        num_images, dim = len(ids_n), unit.shape[1]
        self.ids_n = ids_n
        self.error = (dim + 2) * 2.0**-23 + 2 * RESOLUTION  # of a float32 inner product of unit vectors less a radius
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
            self._rows_nE[self._row_of_column_n[columns], :dim] = unit[as_slice(ids_n[columns])]

    def pairs(self, queries: Queries, rule: Rule) -> Iterator[PairList]:
        first_QB = self._first_scores(queries.features)
        radii = _Radii(first_QB, rule, queries.unsearched(rule, self.error), self.error)
        rows, columns_P = np.nonzero(first_QB >= radii.radius_Q[:, None])
        scores_P, rows_P = first_QB[rows, columns_P], rows.astype(np.int32)
        del first_QB, rows
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
        """Scored pairs without those of an image with itself, and which of them reach the threshold."""
        other_P = np.flatnonzero(ids_P != queries.ids_Q[rows_P])
        if len(other_P) < len(rows_P):
            rows_P, ids_P, scores_P = rows_P[other_P], ids_P[other_P], scores_P[other_P]
        is_hit_P = np.zeros(len(rows_P), bool)
        if rule.threshold is not None:
            np.greater_equal(scores_P, rule.threshold, out=is_hit_P)
            close_P = np.flatnonzero(np.abs(scores_P - rule.threshold) <= self.error)
            is_hit_P[close_P] = self.exact(queries, rows_P[close_P], ids_P[close_P]) >= in_units(rule.threshold)
        return PairList(rows_P, ids_P, scores_P, is_hit_P)

    def _first_scores(self, queries_QD: Floats) -> Floats:
        """(Q, B) scores of the images of the first block."""
        return np.asarray(queries_QD @ self._rows_nE[self._blocks[0], :-1].T)

    def _above(self, queries_QE: Floats, block: slice) -> tuple[npt.NDArray[np.int32], Ids, Floats]:
        """All pairs whose score is above the query's radius: query (ascending), place of the image in the block, and
        score."""
        lengths_Q, columns_P, above_P = range_search(queries_QE, self._rows_nE[block])
        rows_P = np.repeat(np.arange(len(queries_QE), dtype=np.int32), lengths_Q)
        above_P -= queries_QE[rows_P, -1]
        return rows_P, columns_P, above_P


class _Radii:
    """The score that a pair of each query must reach to matter, `radius_Q`, given the scores seen so far.

    Args:
        first_QB: scores of the first images.
        rule: the limits.
        unsearched_Q: queries without a search.
        error: bound on the error of the scores.
    """

    def __init__(self, first_QB: Floats, rule: Rule, unsearched_Q: npt.NDArray[np.bool_], error: float) -> None:
        self.k = rule.min_neighbors + 1  # the image itself may be among them
        self.border = np.float32(always_wanted(rule, error))
        self.unsearched_Q = unsearched_Q
        self.error = error
        missing = max(0, self.k - first_QB.shape[1])
        self._scores = [first_QB, np.full((len(first_QB), missing), -np.inf, np.float32)]
        self.tighten()

    def learn(self, rows_P: npt.NDArray[np.int32], scores_P: Floats) -> None:
        """Note the scores of more pairs, in the order of their rows."""
        open_P = np.flatnonzero(self.is_open_Q[rows_P])
        rows_P, ranks_P = rows_P[open_P], rank_in_row(rows_P[open_P])
        scores_QB = np.full((len(self.is_open_Q), int(ranks_P.max(initial=-1)) + 1), -np.inf, np.float32)
        scores_QB[rows_P, ranks_P] = scores_P[open_P]
        self._scores.append(scores_QB)

    def tighten(self) -> None:
        """Recompute the radii from what was noted."""
        best_Qk = np.partition(np.hstack(self._scores), -self.k, axis=1)[:, -self.k :]
        self._scores = [best_Qk]
        self.radius_Q = np.clip(best_Qk[:, 0] - 2 * self.error, -UNREACHABLE, self.border).astype(np.float32)
        self.radius_Q[self.unsearched_Q] = UNREACHABLE
        self.is_open_Q = self.radius_Q < self.border


def as_slice(ids_n: Ids) -> slice | Ids:
    """Consecutive ids as a slice: a memory map then reads them in one go."""
    is_run = int(ids_n[-1] - ids_n[0]) == len(ids_n) - 1
    return slice(int(ids_n[0]), int(ids_n[-1]) + 1) if is_run else ids_n
