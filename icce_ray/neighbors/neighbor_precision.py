"""Precision of the neighbours, estimated without labels [ours] (docs/METHOD.md, "Automatic threshold"), and its curve
over thresholds, measured by comparing sampled images with all others.

Two images are taken to be of one class if k-means puts them into one cluster from two different starts. The share of
neighbours for which that holds follows the share with the same label: for lists of 60 to N/K neighbours within 5 points
on CIFAR-10 and Fashion-MNIST features, centred or not, and up to 8 points below on digits. A single run overestimates
the precision if classes overlap (by 10 points on CIFAR-10), because its borders lie where neighbours are few; two runs
disagree there. The estimate cannot tell which clusters are wanted: raw pixels of photos cluster well by something other
than their labels.

Legend: N images, D feature dimension, K clusters, R k-means runs, P pairs, Q sampled queries, B columns at a time, T
thresholds, C = R + 1 numbers of runs that agree, k list length.
"""

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from icce_ray.neighbors.search import QUERY_BLOCK
from icce_ray.runtime.threads import in_threads, threads_within
from icce_ray.sample.unit_features import Floats, Ids, UnitFeatures

NUM_RUNS = 8
NUM_ITERATIONS = 15
MIN_TRAINING_IMAGES = 20_000
TRAINING_IMAGES_PER_CLUSTER = 64
LABEL_BLOCK = 4096
AGREEMENT_WEIGHTS = np.array([c * (c - 1) / (NUM_RUNS * (NUM_RUNS - 1)) for c in range(NUM_RUNS + 1)])
"""Share of pairs of runs that both put two images into one cluster, by the number of runs that do."""
FINEST_STEP = 1e-5
"""Smallest step between two thresholds."""
BLOCK_CELL_BYTES = 32
"""Memory per pair while it is counted."""


def cluster_labels(unit: UnitFeatures, num_clusters: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """Labels from `NUM_RUNS` independent spherical k-means runs with K clusters, at most N: (R, N) int32. Each run
    learns its centroids from a random sample of the images, which bounds the time at any N."""
    num_images = len(unit)
    num_clusters = min(num_clusters, num_images)
    num_training = min(num_images, max(MIN_TRAINING_IMAGES, TRAINING_IMAGES_PER_CLUSTER * num_clusters))
    draws = [
        (np.sort(rng.choice(num_images, num_training, replace=False)), int(rng.integers(2**31)))
        for _ in range(NUM_RUNS)
    ]

    def centroids_of(draw: tuple[Ids, int]) -> Floats:
        sample, seed = draw
        return spherical_kmeans(unit[sample], num_clusters, seed)

    # Each run uses one thread, so that its sums do not depend on the machine. The runs share the cores instead.
    dim = unit.shape[1]
    centroids_RKD = in_threads(centroids_of, draws, threads_within(4 * num_training * dim))
    labels_RN = np.empty((NUM_RUNS, num_images), np.int32)

    def label(start: int) -> None:
        block_BD = unit[start : start + LABEL_BLOCK]
        for run, centroids_KD in enumerate(centroids_RKD):
            labels_RN[run, start : start + len(block_BD)] = (block_BD @ centroids_KD.T).argmax(axis=1)

    in_threads(label, range(0, num_images, LABEL_BLOCK), threads_within(LABEL_BLOCK * (20 * dim + 4 * num_clusters)))
    return labels_RN


def times_together(labels_RA: npt.NDArray[np.int32], labels_RB: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Number of runs in which each image of A shares its cluster with each image of B, (A, B) uint8."""
    count_AB = np.zeros((labels_RA.shape[1], labels_RB.shape[1]), np.uint8)
    for labels_A, labels_B in zip(labels_RA, labels_RB, strict=True):
        count_AB += labels_A[:, None] == labels_B[None, :]
    return count_AB


def spherical_kmeans(points_MD: Floats, num_clusters: int, seed: int) -> Floats:
    """Centroids of unit length, (K, D) float32. They do not depend on the number of threads."""
    # One thread, since the sums, and with them the threshold, must not depend on the machine.
    num_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(
            points_MD.shape[1],
            num_clusters,
            niter=NUM_ITERATIONS,
            seed=seed,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=2**31 - 1,
        )
        kmeans.train(np.ascontiguousarray(points_MD))
    finally:
        faiss.omp_set_num_threads(num_threads)
    assert kmeans.centroids is not None
    return kmeans.centroids


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
    unit: UnitFeatures, queries_Q: Ids, labels_RN: npt.NDArray[np.int32], thresholds_T: npt.NDArray[np.float64]
) -> Ids:
    """Compare the query images with all others and count the pairs between each threshold and the next, by the number
    of k-means runs that put both images into one cluster: (Q, T, R + 1). Thresholds are ascending multiples of
    `FINEST_STEP`."""
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
    thresholds_T: npt.NDArray[np.float64], counts_QTC: Ids, together_Qk: npt.NDArray[Any], max_neighbors: int | None
) -> Curves:
    """The figures for each threshold, from the counts of :func:`count_pairs` and the number of k-means runs in which
    each of a query's `min_neighbors` most similar shares its cluster (Q, k)."""
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
