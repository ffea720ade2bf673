"""Memory that k-means needs, known before it starts. The rows themselves lie in files that are memory-mapped, and don't
count: where memory is short they are read from disk in each pass.

N images, D feature dimension, d dimensions of the rows, K clusters, H starts, T threads of a worker, W workers.
"""

from __future__ import annotations

from icce_ray.config import KMeansConfig
from icce_ray.methods.kmeans.kmeans_shard import BLOCK_ELEMENTS
from icce_ray.methods.kmeans.projection import ELEMENTS_AT_A_TIME, MAX_PRODUCTS

SAMPLE_ROWS, SAMPLE_ROWS_PER_CLUSTER = 20_000, 10
"""Images that k-means++ chooses the starts from."""


def sample_size(num_clusters: int) -> int:
    """Number of images that k-means++ chooses K starts from."""
    return max(SAMPLE_ROWS, SAMPLE_ROWS_PER_CLUSTER * num_clusters)


def worker_bytes(settings: KMeansConfig, num_images: int, dim: int, num_clusters: int, num_threads: int) -> int:
    """``8 K d`` sums for each thread, 24 bytes for each number of a block, ``12 K d`` centroids, ``16 d`` for each row
    of the sample, ``8 D D`` covariance sums of each part; with mini-batches ``8 N`` for the order of the images."""
    d = settings.num_components or dim
    cells = num_clusters * d
    products = 0 if settings.num_components is None else 8 * min(MAX_PRODUCTS, 256 * dim**2)
    order = 8 * num_images if settings.algorithm == "mini_batch" else 0
    blocks = num_threads * (8 * cells + 24 * max(BLOCK_ELEMENTS, ELEMENTS_AT_A_TIME))
    return blocks + 12 * cells + 16 * d * min(num_images, sample_size(num_clusters)) + products + order


def driver_bytes(settings: KMeansConfig, num_images: int, dim: int, num_clusters: int, num_workers: int) -> int:
    """``12 H N`` labels, as a matrix and as a file, ``8 K d`` sums of each worker, and ``4 H K d`` centroids."""
    cells = num_clusters * (settings.num_components or dim)
    labels = 12 * settings.num_starts * num_images
    return labels + 8 * (num_workers + 2) * cells + 4 * settings.num_starts * cells
