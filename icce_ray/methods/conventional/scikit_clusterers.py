"""Scikit-learn's clusterers as methods: one clustering each (docs/METHOD.md, "Conventional clusterers").

They compare many or all pairs of images, so a method has a limit of images above which a sample is clustered, and the
memory is checked before the work starts.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.cluster import HDBSCAN, AffinityPropagation, AgglomerativeClustering, SpectralClustering
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

from icce_ray.config import ConventionalConfig
from icce_ray.errors import InputError
from icce_ray.methods.clusterings import Clusterings
from icce_ray.metrics.label_free_scores import PCA_DIMS, PROJECTIONS
from icce_ray.runtime.machine import available_memory_bytes, require_memory
from icce_ray.runtime.progress import QUIET, Progress
from icce_ray.sample.unit_features import prepare

DAMPING, MAX_ITERATIONS = 0.9, 1_000
"""Affinity propagation. With scikit-learn's defaults, 0.5 and 200, it often doesn't converge."""
UMAP_BYTES = 4_000
"""Memory of UMAP for each image, besides its features."""


@dataclass(frozen=True)
class Clusterer:
    """How scikit-learn is called."""

    make: Callable[[ConventionalConfig, int | None, int, int], Any]
    """From the settings, the number of clusters (None where the method finds it), the seed and the number of images."""
    needed_bytes: Callable[[ConventionalConfig, int, int, int], float]
    """Memory besides the points, from the settings and the numbers of images N, dimensions D and clusters K."""
    remedy: str
    """What to change if it finds fewer than two clusters."""


CLUSTERERS = {
    # The distances of all pairs, and the copy that the merging works on.
    "agglomerative": Clusterer(
        lambda settings, num_clusters, seed, n: AgglomerativeClustering(
            num_clusters, linkage=settings.linkage, distance_threshold=settings.distance_threshold
        ),
        lambda settings, n, d, k: 8.0 * n**2,
        "lower conventional.distance_threshold",
    ),
    # The factors of the Laplacian, which are dense in the worst case.
    "spectral": Clusterer(
        lambda settings, num_clusters, seed, n: SpectralClustering(
            num_clusters, affinity="nearest_neighbors", n_neighbors=min(settings.num_neighbors, n), random_state=seed
        ),
        lambda settings, n, d, k: 12.0 * n**2,
        "raise conventional.num_neighbors",
    ),
    # Similarities, responsibilities, availabilities and a work array, and the noise that breaks ties.
    "affinity_propagation": Clusterer(
        lambda settings, num_clusters, seed, n: AffinityPropagation(
            damping=DAMPING, max_iter=MAX_ITERATIONS, preference=settings.preference, random_state=seed
        ),
        lambda settings, n, d, k: 32.0 * n**2,
        "raise conventional.preference",
    ),
    "hdbscan": Clusterer(
        lambda settings, num_clusters, seed, n: HDBSCAN(
            min_cluster_size=settings.min_cluster_size, copy=True, n_jobs=1
        ),
        lambda settings, n, d, k: 16.0 * n * d + 1_000.0 * n,
        "lower conventional.min_cluster_size, or set conventional.representation: umap",
    ),
    "gmm": Clusterer(
        lambda settings, num_clusters, seed, n: GaussianMixture(
            num_clusters, covariance_type=settings.covariance, random_state=seed
        ),
        lambda settings, n, d, k: 16.0 * n * (d + 2 * k) + 32.0 * k * (d**2 if settings.covariance == "full" else d),
        "ask for fewer clusters",
    ),
}


def fit(
    features_ND: npt.NDArray[Any],
    settings: ConventionalConfig,
    *,
    method: str,
    num_clusters: int | None,
    seed: int,
    progress: Progress = QUIET,
) -> Clusterings:
    """Cluster the images with the clusterer `method` of scikit-learn's; it finds the number of clusters if that is
    None.

    It computes with one thread, since sums would otherwise depend on the number of threads. Returns one row of labels,
    0..K-1 without gaps, -1 for noise; as notes `num_clusters` (found), `num_noise` and `converged`. Raises InputError:
    features that are not finite, or fewer than two clusters were found; ResourceError: this machine lacks the memory;
    the message says what is needed.
    """
    clusterer = CLUSTERERS[method]
    check_memory(method, settings, *features_ND.shape, num_clusters=num_clusters)
    with threadpool_limits(1), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        points_Nd = represent(features_ND, settings, seed)
        progress.update(1, 2, method)
        try:
            labels_N = np.arange(len(points_Nd))  # `spectral` cannot have as many clusters as images
            if num_clusters != len(points_Nd):
                labels_N = clusterer.make(settings, num_clusters, seed, len(points_Nd)).fit_predict(points_Nd)
        except ValueError as error:
            raise InputError(f"method {method}: {error}") from None
    used, codes_N = np.unique(labels_N, return_inverse=True)
    codes_N = codes_N - np.count_nonzero(used < 0)
    num_found, num_noise = int(codes_N.max()) + 1, int((codes_N < 0).sum())
    if num_found < 2:
        remedy = clusterer.remedy if np.ptp(points_Nd, axis=0).any() else "all have the same features"
        raise InputError(
            f"method {method} found {num_found} clusters among {len(labels_N):,} images ({num_noise:,} are noise); at "
            f"least 2 are needed: {remedy}"
        )
    progress.update(2, 2, method)
    notes = {
        "num_clusters": num_found,
        "num_noise": num_noise,
        "converged": not any(issubclass(each.category, ConvergenceWarning) for each in caught),
    }
    return Clusterings(codes_N[None].astype(np.int32), notes=notes)


def represent(
    features_ND: npt.NDArray[np.floating[Any]], settings: ConventionalConfig, seed: int
) -> npt.NDArray[np.float64]:
    """The points that are clustered: (N, d). In float32, the covariances of `gmm` would be singular after UMAP. Raises
    InputError: features that are not finite."""
    unit = prepare(features_ND, center=settings.normalize)
    points_ND = unit[:] if settings.normalize else np.array(features_ND, dtype=np.float32)
    if settings.representation != "raw":
        points_ND = PROJECTIONS[settings.representation](points_ND, seed)
    return points_ND.astype(np.float64)


def check_memory(
    method: str, settings: ConventionalConfig, num_images: int, dim: int, *, num_clusters: int | None
) -> None:
    """Refuse before anything is allocated. Raises ResourceError: how much is needed, how much there is, what to
    change."""
    points_dim = dim if settings.representation == "raw" else min(dim, PCA_DIMS)
    preparing = 12.0 * num_images * dim + (UMAP_BYTES * num_images if settings.representation == "umap" else 0)
    clustering = 8.0 * num_images * points_dim
    clustering += CLUSTERERS[method].needed_bytes(settings, num_images, points_dim, num_clusters or 0)
    require_memory(
        max(preparing, clustering),
        available_memory_bytes(),
        f"method {method}: {num_images:,} images of {dim} dimensions",
        "Set sample.max_images to fewer images, which are clustered while the classifier labels the rest, or use a "
        "machine with more memory",
    )
