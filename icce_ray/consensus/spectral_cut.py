"""Spectral clustering of the neighbour graph that the heads weigh (docs/METHOD.md, "Spectral cut").

It reads the whole graph in one place, so it is for inputs of limited size.

Shape letters: N images, K clusters.
"""

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix, diags
from threadpoolctl import threadpool_limits

from icce_ray.consensus.eigenvectors import largest_eigenvectors
from icce_ray.consensus.label_matrix import Labels
from icce_ray.consensus.neighbor_score import NeighborScore, neighbor_ids
from icce_ray.consensus.partition import PartitionError

MAX_WORK = 50_000_000
"""Images times clusters squared: some seconds on one core."""
MAX_EDGES = 5_000_000
"""Edges of a graph that is read as a whole: half a gigabyte."""
NUM_STARTS = 10
"""Starts of k-means."""


def spectral_cut(score: NeighborScore, num_clusters: int, *, seed: int) -> Labels:
    """Clusters 0..num_clusters-1 of all images (N,). Raises PartitionError: the input is too large, or the eigenvectors
    weren't found."""
    from sklearn.cluster import KMeans  # takes two seconds, and most processes of the consensus do not need it

    num_images = score.nearest.shape[0]
    if (work := num_images * num_clusters**2) > MAX_WORK:
        input_size = f"{num_images:,} images and {num_clusters:,} clusters"
        raise PartitionError(f"{input_size}: {work:,} are over the limit of {MAX_WORK:,}")
    if num_images <= num_clusters:
        raise PartitionError(f"{num_images:,} images are too few for {num_clusters:,} clusters")
    scale_N = 1 / np.sqrt(np.maximum(score.degree_N, 1))
    graph = diags(scale_N) @ to_matrix(score) @ diags(scale_N)
    with threadpool_limits(1):  # several threads may round a sum differently
        rng = np.random.default_rng(seed)
        _, vectors_NK = largest_eigenvectors(graph, num_clusters, rng.uniform(-1, 1, num_images))
        rows_NK, starts = vectors_NK * scale_N[:, None], rng.integers(0, 2**31, NUM_STARTS)
        found = [KMeans(num_clusters, n_init=1, random_state=int(start)).fit_predict(rows_NK) for start in starts]
    clusterings = [labels_N.astype(np.int32) for labels_N in found]
    shares = score.mean_shares(clusterings, num_clusters)
    best_N: Labels = clusterings[int(np.argmax(shares))]
    return best_N


def to_matrix(score: NeighborScore) -> csr_matrix:
    """The weights of the edges, in both directions (N, N). Raises PartitionError: there are too many."""
    num_images, num_neighbors = score.nearest.shape
    if (num_edges := num_images * num_neighbors) > MAX_EDGES:
        raise PartitionError(f"{num_edges:,} edges are over the limit of {MAX_EDGES:,}")
    sources = np.repeat(np.arange(num_images), num_neighbors)
    edges = (score.weights_Nk.ravel().astype(np.float64), (sources, neighbor_ids(score.nearest, 0, num_images).ravel()))
    directed = coo_matrix(edges, shape=(num_images, num_images)).tocsr()
    return directed + directed.T
