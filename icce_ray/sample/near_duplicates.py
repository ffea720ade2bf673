"""Near-duplicates: the same picture again, rescaled or saved anew [ours] (docs/METHOD.md, "Near-duplicates").

Only one image of each group of near-duplicates is trained on, the leader: the one with the lowest number.

Every pair is found, but few pairs are compared in all dimensions. Projected onto a few orthonormal directions, with the
length of the rest as one more coordinate, unit vectors stay unit vectors and their cosine can only grow. So the pairs
that reach the threshold there include all that reach it in all dimensions. The first coordinate narrows the search
further: rows that differ in it by more than the threshold's distance are no pair.

Legend: N images, D feature dimension, M directions, n distinct rows, P pairs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.sample.unit_features import RESOLUTION, Floats, Ids, UnitFeatures, exact_similarity, in_units, prepare

T = TypeVar("T")

NUM_NEAREST = 20
NUM_QUERIES = 256
AUTO_SHARE_OF_DISTANCE = 0.01
"""`auto`: near-duplicates are this much nearer to each other, in 1 - cosine, than an image to its `NUM_NEAREST`-th most
similar one. Digits, CIFAR-10 and Fashion-MNIST have no such pairs."""
MIN_DISTANCE = 1e-5
"""Below this, float32 features cannot tell a copy from a neighbour."""
MAX_DUPLICATES_PER_IMAGE = 32
"""Pairs kept of each image: those with the lowest numbers."""
MIN_LEADERS = NUM_NEAREST + 1
"""If fewer images would remain, the collection has too little variety to leave any out."""

NUM_DIRECTIONS = 31
NUM_PCA_ROWS = 2000
NUM_PCA_ITERATIONS = 3
PROJECTION_ERROR = 1e-5
"""Bound on the error of an inner product of projected rows."""
ROWS_PER_PART = 16_384
QUERY_BLOCK = 2048
BASE_BLOCK = 4096


@dataclass(frozen=True)
class SearchPlan:
    """The inputs of the search, apart from the features."""

    mean_D: npt.NDArray[np.float64]
    directions_DM: Floats
    """Orthonormal columns; about the M principal directions of the features."""
    threshold: float
    """Cosine of centred features at which images are near-duplicates."""


@dataclass(frozen=True)
class ProjectedRows:
    """The distinct rows of the features, in the order of their first coordinate."""

    mean_D: npt.NDArray[np.float64]
    threshold: float
    rows_n: Ids
    projected_nM: Floats
    """(n, M + 1)."""
    first_N: Ids
    """The first of the rows that are identical to each row."""

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Ranges of rows to search with; they depend on n only."""
        num_rows = len(self.rows_n)
        return [(start, min(start + ROWS_PER_PART, num_rows)) for start in range(0, num_rows, ROWS_PER_PART)]


@dataclass(frozen=True)
class DuplicatePairs:
    """P pairs of near-duplicates by row number, ascending by (higher, lower); `units_P` is their cosine in units of
    `RESOLUTION`. Of each image only the `MAX_DUPLICATES_PER_IMAGE` lowest are listed."""

    higher_P: Ids
    lower_P: Ids
    units_P: Ids

    def __len__(self) -> int:
        return len(self.higher_P)

    @staticmethod
    def join(lists: Sequence[DuplicatePairs]) -> DuplicatePairs:
        """The pairs of all lists, in order."""
        columns = [(pairs.higher_P, pairs.lower_P, pairs.units_P) for pairs in lists]
        none = np.empty(0, np.int64)
        higher_P, lower_P, units_P = map(np.concatenate, zip((none, none, none), *columns, strict=True))
        order_P = np.lexsort((lower_P, higher_P))
        is_first_P = np.diff(higher_P[order_P], prepend=-1) != 0
        first_P = np.flatnonzero(is_first_P)[np.cumsum(is_first_P) - 1]
        order_P = order_P[np.arange(len(order_P)) - first_P < MAX_DUPLICATES_PER_IMAGE]
        return DuplicatePairs(higher_P[order_P], lower_P[order_P], units_P[order_P])


@dataclass(frozen=True)
class NearDuplicates:
    """The near-duplicates of a collection."""

    pairs: DuplicatePairs
    leader_N: Ids
    """For each image the row that is trained on for it, its own if it is no near-duplicate."""
    threshold: float

    @property
    def leaders(self) -> Ids:
        """Ascending rows that are trained on."""
        return np.flatnonzero(self.leader_N == np.arange(len(self.leader_N)))

    @property
    def followers(self) -> Ids:
        """Ascending rows that are not."""
        return np.flatnonzero(self.leader_N != np.arange(len(self.leader_N)))


def find_near_duplicates(
    features_ND: npt.NDArray[np.floating[Any]], setting: float | Literal["auto"]
) -> NearDuplicates:
    """The near-duplicates among the rows of a feature matrix, found in this process. The `setting` is the threshold, a
    cosine above 0, or `auto`. Raises InputError: features that are not finite, or fewer than two."""
    plan = plan_search(features_ND, setting)
    projected = sort_rows(plan, *project_rows(features_ND, plan))
    return group(projected, [find_pairs(features_ND, projected, start, stop) for start, stop in projected.parts])


def plan_search(features_ND: npt.NDArray[np.floating[Any]], setting: float | Literal["auto"]) -> SearchPlan:
    """Measure what the search needs. The directions may differ between machines in the last bits; the pairs do not."""
    unit = prepare(features_ND, center=True)
    assert unit.mean_D is not None
    threshold = auto_threshold(unit) if setting == "auto" else setting
    return SearchPlan(unit.mean_D, _principal_directions(unit[_spread(len(unit), NUM_PCA_ROWS)]), threshold)


def auto_threshold(unit: UnitFeatures) -> float:
    """`AUTO_SHARE_OF_DISTANCE` of the median distance between an image and its `NUM_NEAREST`-th most similar one, as a
    cosine; 1 if that is less than features can resolve, so that only copies are near-duplicates."""
    queries_QD = unit[_spread(len(unit), NUM_QUERIES)]
    k = min(NUM_NEAREST, len(unit) - 1) + 1  # the image itself is among them
    nearest_Qk = np.empty((len(queries_QD), 0), np.float32)
    for start in range(0, len(unit), BASE_BLOCK):
        cosines = np.hstack([nearest_Qk, queries_QD @ unit[start : start + BASE_BLOCK].T])
        nearest_Qk = np.partition(cosines, -min(k, cosines.shape[1]), axis=1)[:, -k:]
    # Rounded, so that the rounding errors of other machines and threads give the same threshold.
    distance = float(f"{AUTO_SHARE_OF_DISTANCE * (1.0 - float(np.median(nearest_Qk.min(axis=1)))):.3g}")
    return 1.0 - distance if distance >= MIN_DISTANCE else 1.0


def project_rows(
    features_ND: npt.NDArray[np.floating[Any]], plan: SearchPlan, start: int = 0, stop: int | None = None
) -> tuple[Floats, npt.NDArray[np.void]]:
    """For some rows, by default all: the projected rows (n, M + 1) float32, and digests (n,) that are equal only for
    identical rows."""
    unit = UnitFeatures(features_ND, plan.mean_D)
    projected, digests = [np.empty((0, plan.directions_DM.shape[1] + 1), np.float32)], []
    stop = len(unit) if stop is None else stop
    for first in range(start, stop, ROWS_PER_PART):
        rows = slice(first, min(first + ROWS_PER_PART, stop))
        unit_nD = unit[rows]
        projected_nM = unit_nD @ plan.directions_DM
        rest_n = np.sqrt(np.maximum(0.0, (unit_nD**2).sum(axis=1) - (projected_nM**2).sum(axis=1)))
        projected.append(np.column_stack([projected_nM, rest_n]))
        digests += [hashlib.blake2b(row, digest_size=16).digest() for row in np.ascontiguousarray(features_ND[rows])]
    return np.concatenate(projected), np.frombuffer(b"".join(digests), "V16")


def sort_rows(plan: SearchPlan, projected_NM: Floats, digests_N: npt.NDArray[np.void]) -> ProjectedRows:
    """What the search looks at, from what `project_rows` returned for all rows."""
    _, first_n, distinct_N = np.unique(digests_N, return_index=True, return_inverse=True)
    rows_n = np.sort(first_n)
    rows_n = rows_n[np.argsort(projected_NM[rows_n, 0], kind="stable")]
    return ProjectedRows(plan.mean_D, plan.threshold, rows_n, projected_NM[rows_n], first_n[distinct_N])


def find_pairs(
    features_ND: npt.NDArray[np.floating[Any]], projected: ProjectedRows, start: int, stop: int
) -> DuplicatePairs:
    """The pairs of the distinct rows at places `start` to `stop` with all at later places."""
    unit, rows_n, projected_nM = UnitFeatures(features_ND, projected.mean_D), projected.rows_n, projected.projected_nM
    lowest = projected.threshold - PROJECTION_ERROR
    reach = np.sqrt(2.0 * (1.0 - lowest))
    found: list[DuplicatePairs] = []
    for first in range(start, stop, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, stop)
        end = int(np.searchsorted(projected_nM[:, 0], projected_nM[last - 1, 0] + reach, side="right"))
        for base in range(first, end, BASE_BLOCK):
            cosines_QB = projected_nM[first:last] @ projected_nM[base : min(base + BASE_BLOCK, end)].T
            queries_P, columns_P = np.nonzero(cosines_QB >= lowest)
            places_P, others_P = first + queries_P, base + columns_P
            later_P = np.flatnonzero(others_P > places_P)
            one_P, other_P = rows_n[places_P[later_P]], rows_n[others_P[later_P]]
            units_P = exact_similarity(unit, one_P, unit, other_P)
            near_P = np.flatnonzero(units_P >= in_units(projected.threshold))
            one_P, other_P, units_P = one_P[near_P], other_P[near_P], units_P[near_P]
            found.append(DuplicatePairs(np.maximum(one_P, other_P), np.minimum(one_P, other_P), units_P))
    return DuplicatePairs.join(found)


def group(projected: ProjectedRows, found: Sequence[DuplicatePairs]) -> NearDuplicates:
    """Choose the leaders from the pairs of all parts: by ascending number, an image follows the lowest leader that it
    is a near-duplicate of, or becomes one itself."""
    first_N, num_images = projected.first_N, len(projected.first_N)
    copies = np.flatnonzero(first_N != np.arange(num_images))
    identical = DuplicatePairs(copies, first_N[copies], np.full(len(copies), in_units(1.0)))
    distinct = DuplicatePairs.join(found)
    leader_N = np.arange(num_images)
    for higher, lower in zip(distinct.higher_P.tolist(), distinct.lower_P.tolist(), strict=True):
        if leader_N[higher] == higher and leader_N[lower] == lower:
            leader_N[higher] = lower
    leader_N = leader_N[first_N]
    if (leader_N == np.arange(num_images)).sum() < min(MIN_LEADERS, num_images):
        leader_N = np.arange(num_images)
    return NearDuplicates(DuplicatePairs.join([distinct, identical]), leader_N, projected.threshold)


def pair_table(pairs: DuplicatePairs, image_ids_N: Ids) -> pa.Table:
    """image_id, duplicate_of, similarity: every pair, by image ids."""
    return pa.table(
        {
            "image_id": image_ids_N[pairs.higher_P],
            "duplicate_of": image_ids_N[pairs.lower_P],
            "similarity": (pairs.units_P * RESOLUTION).astype(np.float32),
        }
    )


def group_table(leader_N: Ids, image_ids_N: Ids) -> pa.Table:
    """image_id, leader: every image of a group of at least two, by group."""
    sizes_N = np.bincount(leader_N, minlength=len(leader_N))
    members = np.flatnonzero(sizes_N[leader_N] > 1)
    members = members[np.argsort(leader_N[members], kind="stable")]
    return pa.table({"image_id": image_ids_N[members], "leader": image_ids_N[leader_N[members]]})


def _principal_directions(sample_nD: Floats) -> Floats:
    """About the directions in which the sample varies most, orthonormal, by falling variance: (D, M) float32."""
    from sklearn.utils.extmath import randomized_svd  # takes two seconds, and only one task needs it

    _, _, directions_MD = randomized_svd(
        sample_nD.astype(np.float64), min(NUM_DIRECTIONS, sample_nD.shape[1]), n_iter=NUM_PCA_ITERATIONS, random_state=0
    )
    return np.ascontiguousarray(directions_MD.T, np.float32)


def _spread(num_images: int, num_wanted: int) -> Ids:
    """At most `num_wanted` rows, spread evenly over all."""
    return np.unique(np.linspace(0, num_images - 1, min(num_images, num_wanted)).astype(np.int64))


def to_bytes(arrays: DuplicatePairs | ProjectedRows) -> bytes:
    sink = io.BytesIO()
    np.savez(sink, **vars(arrays))
    return sink.getvalue()


def from_bytes(kind: type[T], data: bytes) -> T:
    """The inverse of :func:`to_bytes`. Arrays without a dimension become numbers."""
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        return kind(**{name: array if array.ndim else array.item() for name, array in stored.items()})
