"""Precision of the neighbours, estimated without labels [ours] (docs/METHOD.md, "Automatic threshold").

Two images are taken to be of one class if k-means puts them into one cluster from two different starts. The share of
neighbours for which that holds follows the share with the same label: for lists of 60 to N/K neighbours within 5 points
on CIFAR-10 and Fashion-MNIST features, centred or not, and up to 8 points below on digits. A single run overestimates
the precision if classes overlap (by 10 points on CIFAR-10), because its borders lie where neighbours are few; two runs
disagree there. The estimate cannot tell which clusters are wanted: raw pixels of photos cluster well by something other
than their labels.

Legend: N images, D feature dimension, K clusters, R k-means runs, P pairs.
"""

from __future__ import annotations

import faiss
import numpy as np
import numpy.typing as npt

from icce_ray.runtime.threads import in_threads, threads_within
from icce_ray.sample.unit_features import Floats, Ids, UnitFeatures

NUM_RUNS = 8
NUM_ITERATIONS = 15
MIN_TRAINING_IMAGES = 20_000
TRAINING_IMAGES_PER_CLUSTER = 64
LABEL_BLOCK = 4096

AGREEMENT_WEIGHTS = np.array([c * (c - 1) / (NUM_RUNS * (NUM_RUNS - 1)) for c in range(NUM_RUNS + 1)])
"""Share of pairs of runs that both put two images into one cluster, by the number of runs that do."""


def cluster_labels(unit: UnitFeatures, num_clusters: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """Labels from `NUM_RUNS` independent spherical k-means runs, (R, N) int32.

    Each run learns its centroids from a random sample of the images, which bounds the time at any N.

    Args:
        num_clusters: K; capped at N.
        rng: draws the samples and starts.
    """
    num_images = len(unit)
    num_clusters = min(num_clusters, num_images)
    num_training = min(num_images, max(MIN_TRAINING_IMAGES, TRAINING_IMAGES_PER_CLUSTER * num_clusters))
    draws = [
        (np.sort(rng.choice(num_images, num_training, replace=False)), int(rng.integers(2**31)))
        for _ in range(NUM_RUNS)
    ]

    def centroids_of(draw: tuple[Ids, int]) -> Floats:
        sample, seed = draw
        return spherical_kmeans(unit[sample], num_clusters, seed, NUM_ITERATIONS)

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


def spherical_kmeans(points_MD: Floats, num_clusters: int, seed: int, num_iterations: int) -> Floats:
    """Centroids of unit length, (K, D) float32. They do not depend on the number of threads."""
    # One thread, since the sums, and with them the threshold, must not depend on the machine.
    num_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(
            points_MD.shape[1],
            num_clusters,
            niter=num_iterations,
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
