"""The part of a search that touches every pair: queries against one shard's images, on a CPU by FAISS.

An engine's scores may be wrong by `error`; whoever uses them scores again what stands closer to a border than that. So
every engine, on any device, leads to the same neighbours. `icce_ray.neighbors.torch_engine` is the one for GPUs.

Legend: D feature dimension, n images of the shard, Q queries, P pairs, k list length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

import faiss
import numpy as np
import numpy.typing as npt

from icce_ray.neighbors.prepared import Floats, Ids, PreparedFeatures, Queries
from icce_ray.neighbors.rule import PairList, Rule

RESOLUTION = 2.0**-22
"""Similarities are compared in these units: closer is a tie, and the lower id wins."""
BASE_BLOCK = 16_384
RESCORED_ELEMENTS = 4_000_000
SAMPLE_STRIDE = 12
SAMPLE_BLOCK = 4_096
MIN_SAMPLES_PER_RANK = 4

ScoredPairs = tuple[npt.NDArray[np.int32], Ids, Floats]
"""Of P pairs: number of the query (ascending), image id, score."""


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


def sample_rows(num_images: int, k: int) -> slice:
    """Every so many rows of a shard, few enough to be cheap and enough to hold several times `k`."""
    return slice(None, None, max(1, min(SAMPLE_STRIDE, num_images // (MIN_SAMPLES_PER_RANK * k))))


class CpuEngine(ABC):
    """An engine that knows a lower bound of a query's k-th highest score, and all images from a score on."""

    ids_n: Ids
    error: float
    blocks_at_once = 1  # FAISS has threads of its own

    @abstractmethod
    def lower_bounds(self, queries_QD: Floats, k: int) -> Floats:
        """(Q,) scores that at least `k` images of the shard reach, from a sample; -inf where that is too small."""

    @abstractmethod
    def pairs_above(self, queries_QD: Floats, radius_Q: Floats) -> Iterator[ScoredPairs]:
        """All pairs with a score of at least the query's radius, one block of images after the other."""

    @abstractmethod
    def exact(self, queries: Queries, rows_P: npt.NDArray[np.int32], ids_P: Ids) -> Ids:
        """As `Engine` says."""

    def pairs(self, queries: Queries, rule: Rule) -> Iterator[PairList]:
        # One more than needed: the image itself may be among them.
        bounds_Q = self.lower_bounds(queries.features, rule.min_neighbors + 1) - 2 * self.error
        radius_Q = np.minimum(bounds_Q, lowest_border(rule, self.error))
        radius_Q[is_unsearched(queries, rule, self.error)] = np.inf
        for rows_P, ids_P, scores_P in self.pairs_above(queries.features, radius_Q):
            other_P = np.flatnonzero(ids_P != queries.excluded_Q[rows_P])
            if len(other_P) < len(rows_P):
                rows_P, ids_P, scores_P = rows_P[other_P], ids_P[other_P], scores_P[other_P]
            yield PairList(rows_P, ids_P, scores_P, self._is_hit(queries, rule.threshold, rows_P, ids_P, scores_P))

    def _is_hit(
        self, queries: Queries, threshold: float | None, rows_P: npt.NDArray[np.int32], ids_P: Ids, scores_P: Floats
    ) -> npt.NDArray[np.bool_]:
        if threshold is None:
            return np.zeros(len(rows_P), bool)
        is_hit_P = scores_P >= threshold
        close_P = np.flatnonzero(np.abs(scores_P - threshold) <= self.error)
        is_hit_P[close_P] = self.exact(queries, rows_P[close_P], ids_P[close_P]) >= in_units(threshold)
        return is_hit_P


class FaissEngine(CpuEngine):
    """Holds the rows of a shard in float32, and a column of ones: with minus the radius beside a query, one range
    search serves queries of different radii.

    Args:
        prepared: the features of all images.
        ids_n: the shard's images, ascending.
    """

    def __init__(self, prepared: PreparedFeatures, ids_n: Ids) -> None:
        dim = prepared.shape[1]
        self.ids_n = ids_n
        self.error = similarity_error(dim)
        self._rows_nE = np.empty((len(ids_n), dim + 1), np.float32)
        self._rows_nE[:, dim] = 1.0
        for start in range(0, len(ids_n), BASE_BLOCK):
            block = ids_n[start : start + BASE_BLOCK]
            self._rows_nE[start : start + len(block), :dim] = prepared[as_slice(block)]
        self._sample: tuple[slice, Floats] | None = None

    def lower_bounds(self, queries_QD: Floats, k: int) -> Floats:
        rows = sample_rows(len(self.ids_n), k)
        if self._sample is None or self._sample[0] != rows:
            self._sample = rows, np.ascontiguousarray(self._rows_nE[rows, :-1])
        sample_mD = self._sample[1]
        if len(sample_mD) < k:
            return np.full(len(queries_QD), -np.inf, np.float32)
        # Not by FAISS: its k-th is the last of a sorted list, which takes three times as long as the products.
        best_Qk = np.empty((len(queries_QD), 0), np.float32)
        for start in range(0, len(sample_mD), SAMPLE_BLOCK):
            scores_Qb = queries_QD @ sample_mD[start : start + SAMPLE_BLOCK].T
            best_Qk = np.hstack([best_Qk, scores_Qb]) if start else scores_Qb
            if best_Qk.shape[1] > k:
                best_Qk.partition(best_Qk.shape[1] - k, axis=1)
                best_Qk = best_Qk[:, -k:]
        bounds_Q: Floats = best_Qk.min(axis=1)
        return bounds_Q

    def pairs_above(self, queries_QD: Floats, radius_Q: Floats) -> Iterator[ScoredPairs]:
        # Scores end at 1: a radius beyond 2 finds nothing, and one below -2 everything.
        radius_Q = np.clip(radius_Q, -2.0, 2.0).astype(np.float32)
        queries_QE = np.column_stack([queries_QD, -radius_Q])
        for start in range(0, len(self.ids_n), BASE_BLOCK):
            lengths_Q, above_P, columns_P = _range_search(queries_QE, self._rows_nE[start : start + BASE_BLOCK])
            rows_P = np.repeat(np.arange(len(queries_QD), dtype=np.int32), lengths_Q)
            above_P += radius_Q[rows_P]
            yield rows_P, self.ids_n[start + columns_P], above_P

    def exact(self, queries: Queries, rows_P: npt.NDArray[np.int32], ids_P: Ids) -> Ids:
        columns_P = np.searchsorted(self.ids_n, ids_P)
        return exact_similarity(queries.features, rows_P, self._rows_nE[:, :-1], columns_P)


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
