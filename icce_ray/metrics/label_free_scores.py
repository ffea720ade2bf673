"""Quality of clusters without true labels: silhouette and generalisation score (docs/METHOD.md, "Scores without
labels"), and the spaces that silhouettes are measured in."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

NUM_FOLDS = 10
PCA_DIMS = 50
UMAP_SETTINGS: dict[str, Any] = {"n_neighbors": 30, "n_components": 50, "min_dist": 0.0}
"""The settings of arXiv 2406.02465."""


def label_free_scores(
    features_nD: npt.NDArray[np.float32],
    points: Mapping[str, npt.NDArray[np.float32]],
    labels_n: npt.NDArray[np.integer[Any]],
    *,
    random_state: int,
) -> dict[str, float | None]:
    """`generalization`, and `silhouette_<space>` for each space of `points`, of the same n images; None where a score
    is not defined, such as for a single cluster."""
    silhouettes = {f"silhouette_{space}": silhouette(points_nd, labels_n) for space, points_nd in points.items()}
    return {"generalization": generalization_score(features_nD, labels_n, random_state=random_state)} | silhouettes


def generalization_score(
    features_ND: npt.NDArray[np.floating], labels_N: npt.NDArray[np.integer], *, random_state: int
) -> float | None:
    """10-fold cross-validated accuracy of a linear classifier on the clusters (N,), 0 to 1 (TURTLE, arXiv 2406.07236).

    It is high if the clusters are linearly separable in the features and do not follow noise. Images without a cluster
    (-1) count as wrong, and clusters with fewer images than folds are left out. Returns None if fewer than two are
    left.
    """
    has_cluster = labels_N >= 0
    features_ND, labels_N = features_ND[has_cluster], labels_N[has_cluster]
    _, codes_N, sizes = np.unique(labels_N, return_inverse=True, return_counts=True)
    if np.count_nonzero(sizes >= NUM_FOLDS) < 2:
        return None
    kept = sizes[codes_N] >= NUM_FOLDS
    classifier = make_pipeline(StandardScaler(with_std=False), LogisticRegression(max_iter=200))
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=random_state)
    features_nD = np.asarray(features_ND[kept], dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the score needs no exact optimum
        accuracy = cross_val_score(classifier, features_nD, codes_N[kept], cv=folds).mean()
    return float(has_cluster.mean() * accuracy)


def silhouette(features_ND: npt.NDArray[np.floating], labels_N: npt.NDArray[np.integer]) -> float | None:
    """Mean silhouette (Euclidean), -1 to 1: how much nearer images are to their own cluster than to the next.

    It compares all pairs of images: pass a sample of a large set. An image without a cluster (-1) counts 0, like one
    that is a cluster of its own. Returns None if there is one cluster only, or as many as images.
    """
    has_cluster = labels_N >= 0
    points_nD, labels_n = np.asarray(features_ND[has_cluster], dtype=np.float32), labels_N[has_cluster]
    if not 2 <= len(np.unique(labels_n)) < len(labels_n):
        return None
    return float(has_cluster.mean() * silhouette_score(points_nD, labels_n))


def project_pca(points_nD: npt.NDArray[np.float32], random_state: int) -> npt.NDArray[np.float32]:
    """Coordinates on the first 50 principal components, (n, at most 50)."""
    num_dims = min(PCA_DIMS, *points_nD.shape)
    projected: npt.NDArray[np.float32] = PCA(num_dims, random_state=random_state).fit_transform(points_nD)
    return projected.astype(np.float32)


def project_umap(points_nD: npt.NDArray[np.float32], random_state: int, **changes: Any) -> npt.NDArray[np.float32]:
    """Coordinates in 50 UMAP dimensions (n_neighbors=30, min_dist=0), (n, at most 50), or with `changes`, such as
    n_components=2 for a map. Silhouettes there separate good clusterings from bad ones better than in feature space
    (arXiv 2406.02465). Needs the extra `[umap]`."""
    from umap import UMAP

    num_images = len(points_nD)
    settings = UMAP_SETTINGS | changes
    settings |= {
        "n_neighbors": min(settings["n_neighbors"], num_images - 1),
        "n_components": min(settings["n_components"], num_images - 2),
    }
    embedded: npt.NDArray[np.float32] = UMAP(random_state=random_state, n_jobs=1, **settings).fit_transform(points_nD)
    return embedded


PROJECTIONS = {"pca": project_pca, "umap": project_umap}
"""By the name of the space."""
