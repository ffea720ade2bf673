"""K-means on arrays in one process, as a scikit-learn estimator: the maths of ``method: kmeans``, without Ray.

>>> from icce_ray import KMeans
>>> labels = KMeans(n_clusters=10, random_state=0).fit_predict(features)  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from icce_ray.config import KMeansConfig, validate
from icce_ray.estimator_base import FeatureClusterer
from icce_ray.methods.kmeans.assignment import nearest
from icce_ray.methods.kmeans.fit_kmeans import Shards, fit_kmeans
from icce_ray.methods.kmeans.kmeans_shard import KMeansShard
from icce_ray.runtime.machine import usable_cpus

ROWS_AT_A_TIME = 16_384


@dataclass(repr=False, eq=False)
class KMeans(FeatureClusterer):
    """K-means on centred features, with PCA if wanted (docs/METHOD.md, "K-means").

    Args:
        n_clusters: number of clusters (K).
        n_init: starts; the one with the lowest inertia counts.
        max_iter: limit of the iterations of each start.
        algorithm: ``lloyd``, or ``mini_batch`` (arXiv 2008.10312).
        spherical: scale rows and centroids to unit length.
        n_components: principal components to keep; None: all.
        random_state: int, RandomState or None. An int gives the same labels as a run with that ``seed``.
        device: torch device of the assignment; ``cpu`` is numpy.
        n_threads: CPU threads; None: all. They do not change the result.
        kmeans: more settings of this section of the config, such as ``{"tolerance": 0.0}``.
        verbose: show progress on standard error.

    Attributes:
        labels_: (N,) int32, the clusters of the best start, 0..K-1.
        inertia_: float, sum of squared distances of the projected rows from their centroids.
        cluster_centers_: (K, D) float64, in the space of the features. With `spherical`, their mean plus a direction of
            unit length.
        n_iter_: int, iterations, or epochs of mini-batches, of the best start.
        label_matrix_: (H, N) int32, the clusters of every start: a label matrix for `cluster_ensemble`.
        inertias_: (H,) float64.
        n_features_in_: int, D.
    """

    n_clusters: int
    _: KW_ONLY
    n_init: int = 10
    max_iter: int = 100
    algorithm: Literal["lloyd", "mini_batch"] = "lloyd"
    spherical: bool = False
    n_components: int | None = None
    random_state: int | np.random.RandomState | None = None
    device: str = "cpu"
    n_threads: int | None = None
    kmeans: Mapping[str, Any] | None = None
    verbose: bool = False

    def fit(self, X: npt.ArrayLike, y: object = None) -> KMeans:
        """Cluster the rows of `X`, (N, D) finite; float16 and float32 are used as they are, everything else becomes
        float32. Raises ConfigError: a parameter is out of its range; InputError: fewer rows than clusters, or fewer
        dimensions than components."""
        settings = self._settings()
        features_ND = self._check_rows(X, self.n_clusters)
        num_images, dim = features_ND.shape
        device = None if self.device == "cpu" else self.device
        shard = KMeansShard(lambda: features_ND, num_threads=self.n_threads or usable_cpus(), device=device)
        fitted = fit_kmeans(
            Shards([shard]),
            settings,
            num_images=num_images,
            dim=dim,
            num_clusters=self.n_clusters,
            seed=self._seed(),
            progress=self._progress("kmeans", "iterations"),
        )
        clusterings, best = fitted.clusterings(num_images), fitted.starts[fitted.best]
        self.label_matrix_, self.inertias_ = clusterings.labels_HN, clusterings.losses_H
        self.labels_, self.inertia_ = clusterings.labels_HN[fitted.best], best.inertia
        self.cluster_centers_ = fitted.projection.restore(best.centroids_Kd)
        self.n_iter_ = best.step
        self._projection, self._centroids_Kd = fitted.projection, best.centroids_Kd.astype(np.float32)
        return self

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """The nearest centroid of each row of `X` (n, D), (n,) int32."""
        features_nD = self._check_new(X)
        labels_n = np.empty(len(features_nD), np.int32)
        for start in range(0, len(features_nD), ROWS_AT_A_TIME):
            rows_nd = self._projection(features_nD[start : start + ROWS_AT_A_TIME])
            labels_n[start : start + ROWS_AT_A_TIME] = nearest(rows_nd, self._centroids_Kd)
        return labels_n

    def _settings(self) -> KMeansConfig:
        given = {
            "num_starts": self.n_init,
            "num_iterations": self.max_iter,
            "algorithm": self.algorithm,
            "spherical": self.spherical,
            "num_components": self.n_components,
        }
        return validate(KMeansConfig, given | dict(self.kmeans or {}), type(self).__name__)
