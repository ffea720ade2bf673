"""The adaptive rule: which of the pairs found are neighbours of the queries (docs/METHOD.md, "Adaptive neighbours").

N(i) = all images at least `threshold` similar to i. If these are fewer than `min_neighbors`: the `min_neighbors` most
similar. If they are more than `max_neighbors`: a uniform random subset, drawn by a hash of (seed, i, j), so that it
doesn't depend on how the work is divided.

Pairs whose score is within its error of a border are scored again in float64, and ties go to the lower id. So the
neighbours don't depend on how pairs were found, nor on their order.

Legend: D feature dimension, Q queries, P pairs, k list length, R some of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from icce_ray.random_numbers import splitmix64
from icce_ray.sample.unit_features import Floats, Ids, UnitFeatures, exact_similarity

PADDED_ELEMENTS = 4_000_000

Exact = Callable[[npt.NDArray[np.int32], Ids], Ids]
"""From rows and image ids of pairs to their cosines in units of the resolution."""
UNREACHABLE = 2.0
"""A radius that no score reaches; every score reaches -2."""


@dataclass(frozen=True)
class Rule:
    """Which images are neighbours.

    threshold: lowest cosine of neighbours; None: exactly `min_neighbors` each.
    min_neighbors: at most the number of other images.
    max_neighbors: longer rows keep the images with the smallest hash of (seed, i, j); None: no limit.
    """

    threshold: float | None
    min_neighbors: int
    max_neighbors: int | None
    seed: int


@dataclass(frozen=True)
class PairList:
    """P pairs of a query (its number, 0..Q-1) and an image, with the score and whether it reaches the threshold."""

    rows_P: npt.NDArray[np.int32]
    ids_P: Ids
    scores_P: Floats
    is_hit_P: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.rows_P)

    def take(self, chosen: npt.NDArray[np.integer | np.bool_]) -> PairList:
        if chosen.dtype == bool:
            chosen = np.flatnonzero(chosen)  # once, not for each array
            if len(chosen) == len(self):
                return self
        return PairList(self.rows_P[chosen], self.ids_P[chosen], self.scores_P[chosen], self.is_hit_P[chosen])

    @staticmethod
    def join(lists: Sequence[PairList]) -> PairList:
        if not lists:
            return PairList(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, bool))
        if len(lists) == 1:
            return lists[0]
        columns = zip(*((pairs.rows_P, pairs.ids_P, pairs.scores_P, pairs.is_hit_P) for pairs in lists), strict=True)
        return PairList(*(np.concatenate(column) for column in columns))


def keep(pairs: PairList, num_hits_Q: Ids, ids_Q: Ids, rule: Rule, error: float, exact: Exact) -> PairList:
    """Apply the rule to a superset of the pairs that it keeps, in any order, each once. It is idempotent, so parts may
    be reduced first. `num_hits_Q`: images found above the threshold so far, kept or not. `error` bounds that of the
    scores."""
    is_long_Q = num_hits_Q >= rule.min_neighbors
    pairs = pairs.take(pairs.is_hit_P | ~is_long_Q[pairs.rows_P])
    if rule.max_neighbors is not None and (num_hits_Q > rule.max_neighbors).any():
        is_cut_P = (num_hits_Q > rule.max_neighbors)[pairs.rows_P]
        cut, rest = pairs.take(is_cut_P), pairs.take(~is_cut_P)
        kept_P = random_subset(rule.seed, rule.max_neighbors, cut.rows_P, ids_Q[cut.rows_P], cut.ids_P)
        pairs = PairList.join([rest, cut.take(kept_P)])
    num_pairs_Q = np.bincount(pairs.rows_P, minlength=len(ids_Q))
    is_crowded_Q = ~is_long_Q & (num_pairs_Q > rule.min_neighbors)
    if not is_crowded_Q.any():
        return pairs
    is_crowded_P = is_crowded_Q[pairs.rows_P]
    crowded, rest = pairs.take(is_crowded_P), pairs.take(~is_crowded_P)
    return PairList.join([rest, _nearest(crowded, rule.min_neighbors, error, exact)])


def pair_hash(seed: int, rows_P: Ids, columns_P: Ids) -> npt.NDArray[np.uint64]:
    """A uniform 64-bit number for each (seed, row, column)."""
    row_state_P = splitmix64(splitmix64(np.array([seed], np.uint64)) ^ rows_P.astype(np.uint64))
    return splitmix64(row_state_P ^ columns_P.astype(np.uint64))


def random_subset(seed: int, max_neighbors: int, rows_P: npt.NDArray[np.integer], images_P: Ids, ids_P: Ids) -> Ids:
    """Indices of the pairs that stay if each row keeps at most `max_neighbors`: those with the smallest hash of the
    row's image and the neighbour; of equal hashes the lower ids. Ordered by row, then hash."""
    hash_P = pair_hash(seed, images_P, ids_P)
    # The row and as many bits of the hash as fit beside it sort as one number, in a tenth of the time.
    num_bits = np.uint64(max(1, int(rows_P.max()).bit_length()))
    key_P = (rows_P.astype(np.uint64) << (np.uint64(64) - num_bits)) | (hash_P >> num_bits)
    order_P: Ids = np.argsort(key_P)
    sorted_P = key_P[order_P]
    if (sorted_P[1:] == sorted_P[:-1]).any():
        order_P = np.lexsort((ids_P, hash_P, rows_P))
    return order_P[rank_in_row(rows_P[order_P]) < max_neighbors]


def _nearest(pairs: PairList, k: int, error: float, exact: Exact) -> PairList:
    """The `k` most similar pairs of each row, all of which have more; of ties the lower ids."""
    pairs = pairs.take(np.argsort(pairs.rows_P, kind="stable"))
    _, num_pairs_R = _runs(pairs.rows_P)
    row_P = np.repeat(np.arange(len(num_pairs_R)), num_pairs_R)
    border_P = _kth_scores(pairs.scores_P, num_pairs_R, k)[row_P]
    # Outside these margins, true similarities are on the same side of the k-th as the scores.
    is_safe_P = pairs.scores_P > border_P + 2 * error
    is_close_P = ~is_safe_P & (pairs.scores_P >= border_P - 2 * error)
    num_open_R = k - np.bincount(row_P[is_safe_P], minlength=len(num_pairs_R))
    has_choice_R = np.bincount(row_P[is_close_P], minlength=len(num_pairs_R)) > num_open_R
    kept_P = is_safe_P | is_close_P
    close_P = np.flatnonzero(is_close_P & has_choice_R[row_P])
    units_P = exact(pairs.rows_P[close_P], pairs.ids_P[close_P])
    close_P = close_P[np.lexsort((pairs.ids_P[close_P], -units_P, row_P[close_P]))]
    kept_P[close_P] = rank_in_row(row_P[close_P]) < num_open_R[row_P[close_P]]
    return pairs.take(kept_P)


def _kth_scores(scores_P: Floats, num_pairs_R: Ids, k: int) -> Floats:
    """The `k`-th highest score of each row (R,), all of which have at least `k`; `scores_P` is sorted by row."""
    kth_R = np.empty(len(num_pairs_R), np.float32)
    first_R = np.concatenate([np.zeros(1, np.int64), np.cumsum(num_pairs_R)])
    step = max(1, PADDED_ELEMENTS // int(num_pairs_R.max()))
    for start in range(0, len(num_pairs_R), step):
        lengths_r = num_pairs_R[start : start + step]
        width = int(lengths_r.max())
        padded_rw = np.full((len(lengths_r), width), -np.inf, np.float32)
        padded_rw[np.arange(width) < lengths_r[:, None]] = scores_P[first_R[start] : first_R[start + len(lengths_r)]]
        kth_R[start : start + step] = np.partition(padded_rw, width - k, axis=1)[:, width - k]
    return kth_R


def rank_in_row(sorted_rows_P: npt.NDArray[np.integer]) -> Ids:
    """0, 1, 2, ... within each run of equal values."""
    ranks_P: Ids = np.arange(len(sorted_rows_P)) - np.repeat(*_runs(sorted_rows_P))
    return ranks_P


def _runs(sorted_rows_P: npt.NDArray[np.integer]) -> tuple[Ids, Ids]:
    """Start and length of each run of equal values."""
    is_first_P = np.ones(len(sorted_rows_P), bool)
    np.not_equal(sorted_rows_P[1:], sorted_rows_P[:-1], out=is_first_P[1:])
    first_R = np.flatnonzero(is_first_P)
    return first_R, np.diff(first_R, append=len(sorted_rows_P))


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
        """Cosine of each pair of a query and any image in units of `RESOLUTION`, from float64 products: (P,) int64."""
        return exact_similarity(self.features, rows_P, self.unit, ids_P)


def always_wanted(rule: Rule, error: float) -> float:
    """The score from which on a pair is kept regardless of the rest of its row; `UNREACHABLE` without a threshold."""
    return UNREACHABLE if rule.threshold is None else min(rule.threshold - error, UNREACHABLE)
