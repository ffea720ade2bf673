"""Spectral clustering of the neighbour graph that the heads weigh (docs/METHOD.md, "Spectral cut").

It reads the whole graph in one place, so it is for inputs of limited size.

Shape letters: N images, n images of a graph, K clusters, V eigenvectors.
"""

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix, csr_matrix, diags
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from threadpoolctl import threadpool_limits

from icce_ray.consensus.label_matrix import Labels
from icce_ray.consensus.neighbor_score import NeighborScore
from icce_ray.consensus.partition import PartitionError

MAX_WORK = 50_000_000
"""Images times clusters squared: some seconds on one core."""
MAX_EDGES = 5_000_000
"""Edges of a graph that is read as a whole: half a gigabyte."""
NUM_STARTS = 10
"""Starts of k-means."""
TOLERANCE = 1e-5
"""Relative error of the eigenvalues."""
MAX_DENSE_IMAGES = 5_000
"""Up to so many images, all eigenvectors are computed if the iteration doesn't find the largest: some minutes."""

Floats = npt.NDArray[np.float64]


def spectral_cut(score: NeighborScore, num_clusters: int, *, seed: int) -> Labels:
    """Clusters 0..num_clusters-1 of all images (N,). Raises PartitionError: the input is too large, or the eigenvectors
    weren't found."""
    from sklearn.cluster import KMeans  # takes two seconds, and most processes of the consensus do not need it

    num_images = score.num_images
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
    num_images = score.num_images
    if (num_edges := num_images * score.num_neighbors) > MAX_EDGES:
        raise PartitionError(f"{num_edges:,} edges are over the limit of {MAX_EDGES:,}")
    sources = np.repeat(np.arange(num_images), score.num_neighbors)
    targets_Nk, weights_Nk = score.edges.read(0, num_images)
    edges = (weights_Nk.ravel().astype(np.float64), (sources, targets_Nk.ravel()))
    directed = coo_matrix(edges, shape=(num_images, num_images)).tocsr()
    return directed + directed.T


def largest_eigenvectors(graph: csr_matrix | LinearOperator, number: int, start_n: Floats) -> tuple[Floats, Floats]:
    """The largest eigenvalues of a symmetric matrix (V,), in any order, and their eigenvectors (n, V). The iteration
    begins with `start_n`. Raises PartitionError: they weren't found."""
    try:
        values_V, vectors_nV = eigsh(graph, k=number, which="LA", v0=start_n, tol=TOLERANCE)
    except ArpackNoConvergence as error:
        if len(start_n) > MAX_DENSE_IMAGES:
            raise PartitionError(f"the eigenvectors were not found: {error}") from error
        values_V, vectors_nV = np.linalg.eigh(graph @ np.identity(len(start_n)))
    return values_V[-number:], vectors_nV[:, -number:]
