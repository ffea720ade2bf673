"""Spectral clustering of the neighbour graph that the heads weigh (docs/METHOD.md, "Spectral cut").

It reads the whole graph in one place, so it is for inputs of limited size.

Shape letters: N images, K clusters.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from icce_ray.consensus.label_matrix import Labels
from icce_ray.consensus.neighbor_score import NeighborScore, neighbor_ids
from icce_ray.consensus.partition import PartitionError

MAX_WORK = 50_000_000
"""Images times clusters squared: some seconds on one core."""
TOLERANCE = 1e-5
"""Relative error of the eigenvalues."""
NUM_STARTS = 10
"""Starts of k-means."""


def spectral_cut(score: NeighborScore, num_clusters: int, *, seed: int) -> Labels:
    """Clusters 0..num_clusters-1 of all images (N,). Raises PartitionError: the input is too large, or the eigenvectors
    weren't found."""
    num_images, num_neighbors = score.nearest.shape
    if (work := num_images * num_clusters**2) > MAX_WORK:
        input_size = f"{num_images:,} images and {num_clusters:,} clusters"
        raise PartitionError(f"{input_size}: {work:,} are over the limit of {MAX_WORK:,}")
    if num_images <= num_clusters:
        raise PartitionError(f"{num_images:,} images are too few for {num_clusters:,} clusters")
    sources = np.repeat(np.arange(num_images), num_neighbors)
    edges = (score.weights_Nk.ravel().astype(np.float64), (sources, neighbor_ids(score.nearest, 0, num_images).ravel()))
    directed = coo_matrix(edges, shape=(num_images, num_images)).tocsr()
    scale_N = 1 / np.sqrt(np.maximum(score.degree_N, 1))
    graph = diags(scale_N) @ (directed + directed.T) @ diags(scale_N)
    with threadpool_limits(1):  # several threads may round a sum differently
        start_N = np.random.default_rng(seed).uniform(-1, 1, num_images)
        try:
            _, vectors_NK = eigsh(graph, k=num_clusters, which="LA", v0=start_N, tol=TOLERANCE)
        except ArpackNoConvergence as error:
            raise PartitionError(f"the eigenvectors were not found: {error}") from error
        k_means = KMeans(num_clusters, n_init=NUM_STARTS, random_state=seed)
        clusters_N: Labels = k_means.fit_predict(vectors_NK * scale_N[:, None]).astype(np.int32)
    return clusters_N
