"""How good clusters are, judged without labels (METHOD section 5). scikit-learn does the work."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from icce_ray.errors import InputError, ResourceError
from icce_ray.metrics.scores import normalized_mutual_info

NUM_FOLDS = 10
MAX_IMAGES = 20_000
PCA_DIMS = 50
UMAP_SETTINGS: dict[str, Any] = {"n_neighbors": 30, "n_components": 50, "min_dist": 0.0}
"""arXiv 2406.02465."""


def generalization_score(
    features_ND: npt.NDArray[np.floating],
    labels_N: npt.NDArray[np.integer],
    *,
    random_state: int | None = None,
    max_images: int = MAX_IMAGES,
) -> float:
    """How well a linear classifier learns the clusters: its 10-fold cross-validated accuracy on them, 0 to 1 (TURTLE,
    arXiv 2406.07236). High where the clusters are linear in the features and do not follow noise.

    Args:
        features_ND: (N, D) floating point, finite.
        labels_N: (N,) clusters. Those with fewer images than folds are left out.
        random_state: seed of the folds and of the sample.
        max_images: above this many images a uniform sample is taken.

    Raises:
        InputError: shapes that do not fit, or fewer than two clusters with ten images.
    """
    features_ND, labels_N = _check(features_ND, labels_N)
    features_ND, labels_N = _sample(features_ND, labels_N, max_images, random_state)
    _, codes_N, sizes = np.unique(labels_N, return_inverse=True, return_counts=True)
    kept = sizes[codes_N] >= NUM_FOLDS
    if np.count_nonzero(sizes >= NUM_FOLDS) < 2:
        raise InputError(f"the generalisation score needs two clusters with {NUM_FOLDS} images each")
    classifier = make_pipeline(StandardScaler(with_std=False), LogisticRegression(max_iter=200))
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=random_state)
    features_nD = np.asarray(features_ND[kept], dtype=np.float32)
    return float(cross_val_score(classifier, features_nD, codes_N[kept], cv=folds).mean())


def silhouette(
    features_ND: npt.NDArray[np.floating],
    labels_N: npt.NDArray[np.integer],
    *,
    space: str = "features",
    random_state: int | None = None,
    max_images: int = MAX_IMAGES,
) -> float:
    """Mean silhouette (Euclidean), -1 to 1: how much nearer an image is to its own cluster than to the next.

    Args:
        features_ND: (N, D) floating point, finite.
        labels_N: (N,) clusters.
        space: `features`: as they are. `umap`: in 50 UMAP dimensions (arXiv 2406.02465), which tells good clusterings
            apart better; needs the package umap-learn.
        random_state: seed of UMAP and of the sample.
        max_images: above this many images a uniform sample is taken: the silhouette compares all pairs.

    Raises:
        InputError: shapes that do not fit, fewer than two clusters, or an unknown `space`.
        ResourceError: umap-learn is not installed.
    """
    if space not in ("features", "umap"):
        raise InputError(f"space is {space!r}; it must be 'features' or 'umap'")
    features_ND, labels_N = _check(features_ND, labels_N)
    features_nD, labels_n = _sample(features_ND, labels_N, max_images, random_state)
    num_clusters = len(np.unique(labels_n))
    if not 2 <= num_clusters < len(labels_n):
        raise InputError(
            f"{num_clusters} clusters of {len(labels_n)} images: the silhouette needs at least 2, and fewer than images"
        )
    points = np.asarray(features_nD, dtype=np.float32)
    if space == "umap":
        points = project_umap(points, random_state)
    return float(silhouette_score(points, labels_n))


def stability(labels_a_N: npt.NDArray[np.integer], labels_b_N: npt.NDArray[np.integer]) -> float:
    """Agreement of two clusterings of the same images, say of two seeds: their NMI (geometric), 0 to 1."""
    return normalized_mutual_info(labels_a_N, labels_b_N, mean="geometric")


def project_pca(points_nD: npt.NDArray[np.float32], random_state: int | None) -> npt.NDArray[np.float32]:
    """`points_nD` in 50 principal components, (n, at most 50)."""
    num_dims = min(PCA_DIMS, *points_nD.shape)
    projected: npt.NDArray[np.float32] = PCA(num_dims, random_state=random_state).fit_transform(points_nD)
    return projected.astype(np.float32)


def project_umap(points_nD: npt.NDArray[np.float32], random_state: int | None) -> npt.NDArray[np.float32]:
    """`points_nD` in 50 UMAP dimensions (n_neighbors=30, min_dist=0), (n, at most 50).

    Raises:
        ResourceError: umap-learn is not installed.
    """
    try:
        from umap import UMAP
    except ImportError:
        raise ResourceError(
            "the silhouette in UMAP space needs the package umap-learn: pip install 'icce_ray[umap]', or take "
            "space='features'"
        ) from None
    num_images = len(points_nD)
    settings = UMAP_SETTINGS | {
        "n_neighbors": min(UMAP_SETTINGS["n_neighbors"], num_images - 1),
        "n_components": min(UMAP_SETTINGS["n_components"], num_images - 2),
    }
    embedded: npt.NDArray[np.float32] = UMAP(random_state=random_state, **settings).fit_transform(points_nD)
    return embedded


def _check(features_ND: npt.ArrayLike, labels_N: npt.ArrayLike) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    features, labels = np.asarray(features_ND), np.asarray(labels_N)
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise InputError(
            f"features have shape {features.shape} and labels {labels.shape}; they must be (N, D) and (N,)"
        )
    return features, labels


def _sample(
    features_ND: npt.NDArray[Any], labels_N: npt.NDArray[Any], max_images: int, random_state: int | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    if len(labels_N) <= max_images:
        return features_ND, labels_N
    rows = np.sort(np.random.default_rng(random_state).choice(len(labels_N), max_images, replace=False))
    return features_ND[rows], labels_N[rows]
