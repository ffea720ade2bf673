"""Curves over thresholds: neighbours and precision, measured by comparing sampled images with all others.

Legend: N images, D feature dimension, Q sampled queries, B columns at a time, T thresholds, R k-means runs, C = R + 1
numbers of runs that agree, k list length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from icce_ray.neighbors.neighbor_precision import AGREEMENT_WEIGHTS, NUM_RUNS, times_together
from icce_ray.neighbors.search import QUERY_BLOCK
from icce_ray.runtime.threads import in_threads, threads_within
from icce_ray.sample.unit_features import Floats, Ids, UnitFeatures

FINEST_STEP = 1e-5
"""Smallest step between two thresholds."""
BLOCK_CELL_BYTES = 32
"""Memory per pair while it is counted."""


@dataclass(frozen=True)
class Curves:
    """Figures for each threshold, measured on sampled rows.

    thresholds: (T,) ascending.
    mean_above: (T,) mean number of images above the threshold; mean_neighbors: (T,) after the limits of the rule.
    share_at_min: (T,) share of rows with fewer than `min_neighbors` images above the threshold.
    precision: (T,) estimated precision; precision_at_min: that of the `min_neighbors` most similar.
    """

    thresholds: npt.NDArray[np.float64]
    mean_above: npt.NDArray[np.float64]
    mean_neighbors: npt.NDArray[np.float64]
    share_at_min: npt.NDArray[np.float64]
    precision: npt.NDArray[np.float64]
    precision_at_min: float


def count_pairs(
    unit: UnitFeatures,
    queries_Q: Ids,
    labels_RN: npt.NDArray[np.int32],
    thresholds_T: npt.NDArray[np.float64],
) -> Ids:
    """Compare the query images with all others and count the pairs between each threshold and the next, by the number
    of k-means runs that put both images into one cluster: (Q, T, R + 1).

    Args:
        queries_Q: the images whose rows are measured.
        labels_RN: labels from the k-means runs.
        thresholds_T: ascending multiples of `FINEST_STEP`.
    """
    shape = (len(queries_Q), len(thresholds_T) + 1, NUM_RUNS + 1)
    first_Q1 = (np.arange(len(queries_Q)) * shape[1] * shape[2])[:, None]
    steps_per_unit = round(1 / FINEST_STEP)
    bin_middles = -1.0 + (np.arange(2 * steps_per_unit + 1) + 0.5) * FINEST_STEP
    bin_of_step = (np.searchsorted(thresholds_T, bin_middles, side="right") * shape[2]).astype(np.int32)
    queries_QD, labels_RQ = unit[queries_Q], labels_RN[:, queries_Q]

    def cell(cosine: Floats, together: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
        step = ((cosine.clip(-1.0, 1.0) + 1.0) * steps_per_unit).astype(np.int32)
        cells: npt.NDArray[np.int32] = bin_of_step[step] + together
        return cells

    def count(starts: range) -> Ids:
        counts = np.zeros(np.prod(shape), np.int64)
        for start in starts:
            block = slice(start, start + QUERY_BLOCK)
            cells_QB = cell(queries_QD @ unit[block].T, times_together(labels_RQ, labels_RN[:, block]))
            counts += np.bincount((cells_QB + first_Q1).ravel(), minlength=len(counts))
        return counts

    num_threads = threads_within(8 * int(np.prod(shape)) + BLOCK_CELL_BYTES * len(queries_Q) * QUERY_BLOCK)
    starts = range(0, len(unit), QUERY_BLOCK)
    counts: Ids = np.sum(in_threads(count, [starts[n::num_threads] for n in range(num_threads)], num_threads), axis=0)
    own_Q = np.einsum("qd,qd->q", queries_QD, queries_QD)
    np.subtract.at(counts, first_Q1[:, 0] + cell(own_Q, np.full(len(queries_Q), NUM_RUNS, np.uint8)), 1)
    return counts.reshape(shape)[:, 1:]


def curves_of(
    thresholds_T: npt.NDArray[np.float64],
    counts_QTC: Ids,
    together_Qk: npt.NDArray[np.uint8],
    max_neighbors: int | None,
) -> Curves:
    """The figures for each threshold, from counts of pairs.

    Args:
        thresholds_T: ascending.
        counts_QTC: as `count_pairs` returns them.
        together_Qk: number of k-means runs in which each of a query's `min_neighbors` most similar shares its cluster.
    """
    floor = together_Qk.shape[1]
    weight_Q = np.full(len(counts_QTC), 1.0 / len(counts_QTC))
    # Pairs above each threshold: cumulative sums from the last one down.
    above_QT, pure_QT = (
        np.ascontiguousarray(values_QT[:, ::-1].cumsum(axis=1)[:, ::-1], np.float64)
        for values_QT in (counts_QTC.sum(axis=2), counts_QTC @ AGREEMENT_WEIGHTS)
    )
    nearest_precision_Q = AGREEMENT_WEIGHTS[together_Qk].mean(axis=1)
    at_min_QT = above_QT < floor
    precision_QT = np.where(at_min_QT, nearest_precision_Q[:, None], pure_QT / np.maximum(above_QT, 1))
    lengths_QT = np.maximum(above_QT, floor)
    if max_neighbors is not None:
        lengths_QT = np.minimum(lengths_QT, max_neighbors)
    return Curves(
        thresholds_T,
        weight_Q @ above_QT,
        weight_Q @ lengths_QT,
        weight_Q @ at_min_QT,
        weight_Q @ precision_QT,
        float(weight_Q @ nearest_precision_Q),
    )
