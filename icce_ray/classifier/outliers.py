"""How far an image is from everything that the classifier has seen.

A Gaussian per cluster with one shared covariance: the r largest principal directions of what is left after the cluster
means, and one noise variance for all others (probabilistic PCA). The score is the squared Mahalanobis distance to the
mean of the cluster that the classifier predicts, divided by D: about 1 for an image like those seen. Comparing with
that one mean instead of with all K costs n x D instead of n x D x K. The part outside the r directions is what tells
foreign images: with MobileNet features, AUROC 0.98 for Fashion-MNIST among CIFAR-10 and 1.00 the other way round, where
the distance within the r directions alone gives 0.78 for the former.

Source: Lee et al. (NeurIPS 2018) for the shared covariance; ViM (CVPR 2022) for the residual [ours: their sum].

Shapes: N images, D dims, K clusters, r directions. Storage: D x r + K x D.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

Float32Array = npt.NDArray[np.float32]

MAX_DIRECTIONS = 128
MIN_IMAGES_PER_DIRECTION = 4
NUM_FOLDS = 3
PLENTIFUL_IMAGES_PER_DIM = 20
MIN_VARIANCE = 1e-4
"""Of a direction, as a share of the mean: dimensions that never changed must not make every score infinite."""


@dataclass(frozen=True)
class OutlierModel:
    """Fitted by :func:`fit_outlier_model`; works on features that are already centred and scaled.

    The directions come in rising order of their deviation."""

    directions: Float32Array
    """(D, r): orthonormal columns, each divided by its standard deviation."""
    deviations: Float32Array
    """(r,): standard deviation along each direction."""
    cluster_means: Float32Array
    """(K, D); 0, the mean of all, for clusters without images."""
    noise_variance: float
    """Of every dimension outside the directions."""

    def score(self, x_nD: Float32Array, cluster_n: npt.NDArray[np.integer]) -> Float32Array:
        """(n,) float32, at least 0: squared Mahalanobis distance to the mean of the given cluster, over D."""
        gaps_nD = x_nD - self.cluster_means[cluster_n]
        # d = |gap|^2 / noise + sum_r (1 - variance / noise) white_r(gap)^2: D x D numbers are never made.
        shrink_r = (1.0 - self.deviations.astype(np.float64) ** 2 / self.noise_variance).astype(np.float32)
        white_nr = gaps_nD @ self.directions
        distances_n = np.einsum("nd,nd->n", gaps_nD, gaps_nD) / np.float32(self.noise_variance)
        distances_n += np.einsum("nr,nr,r->n", white_nr, white_nr, shrink_r)
        return np.asarray(np.maximum(distances_n, 0.0) / x_nD.shape[1], dtype=np.float32)

    def project(self, x_nD: Float32Array, num_directions: int) -> Float32Array:
        """(n, at most `num_directions`) coordinates along the directions in which images of a cluster differ most."""
        return x_nD @ (self.directions[:, -num_directions:] * self.deviations[-num_directions:])


def fit_outlier_rule(
    x_ND: Float32Array, labels_N: npt.NDArray[np.integer], num_clusters: int, quantile: float
) -> tuple[OutlierModel, float]:
    """The model, and the score above which an image is an outlier: the given quantile of the scores of these images.

    Where there are few images for their dimensions, they lie much nearer to a model fitted on them than others like
    them (1,500 images in 1,024 dims: 9% of fresh ones above the 99% quantile). Then each third is scored by a model of
    the other two; a little too far, so rather fewer outliers than too many.

    Args:
        x_ND: float32, centred and scaled, in random order or not.
        labels_N: clusters 0..K-1, those that the classifier predicts.
        quantile: share of images like these that are no outliers, between 0 and 1.
    """
    model = fit_outlier_model(x_ND, labels_N, num_clusters)
    num_images, num_dims = x_ND.shape
    if num_images >= PLENTIFUL_IMAGES_PER_DIM * num_dims or num_images < NUM_FOLDS:
        return model, float(np.quantile(model.score(x_ND, labels_N), quantile))
    scores_N = np.empty(num_images, dtype=np.float32)
    fold_N = np.arange(num_images) % NUM_FOLDS
    for fold in range(NUM_FOLDS):
        inside = fold_N == fold
        others = fit_outlier_model(x_ND[~inside], labels_N[~inside], num_clusters)
        scores_N[inside] = others.score(x_ND[inside], labels_N[inside])
    return model, float(np.quantile(scores_N, quantile))


def fit_outlier_model(x_ND: Float32Array, labels_N: npt.NDArray[np.integer], num_clusters: int) -> OutlierModel:
    """Fit on centred and scaled features and the clusters of their images.

    Args:
        x_ND: float32.
        labels_N: integers in 0..K-1.
    """
    num_images, num_dims = x_ND.shape
    sizes_K = np.bincount(labels_N, minlength=num_clusters)
    means_KD = np.zeros((num_clusters, num_dims))
    np.add.at(means_KD, labels_N, x_ND)
    means_KD /= np.maximum(sizes_K, 1)[:, None]
    within_ND = x_ND - means_KD[labels_N].astype(np.float32)
    num_directions = max(1, min(MAX_DIRECTIONS, num_dims // 2, num_images // MIN_IMAGES_PER_DIRECTION))
    variances_r, directions_Dr, total = _principal_directions(within_ND, num_directions)
    smallest = max(MIN_VARIANCE * total / num_dims, np.finfo(np.float32).tiny)
    variances_r = np.maximum(variances_r, smallest)
    # With few images the sample hardly varies in the dimensions left over; what it misses there counts as noise too.
    noise_variance = max((total - float(variances_r.sum())) / max(num_dims - num_directions, 1), smallest)
    deviations_r = np.sqrt(variances_r)
    return OutlierModel(
        directions=np.ascontiguousarray(directions_Dr / deviations_r, dtype=np.float32),
        deviations=deviations_r.astype(np.float32),
        cluster_means=means_KD.astype(np.float32),
        noise_variance=noise_variance,
    )


def _principal_directions(
    x_ND: Float32Array, num_directions: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
    """Variances (r,), ascending, and orthonormal directions (D, r) of the largest ones; and the sum of all D variances.

    Of the two matrices that have these variances, that of dimensions and that of images, the smaller one is solved:
    with 60 images in 3,072 dimensions, in milliseconds instead of seconds.
    """
    num_images, num_dims = x_ND.shape
    of_images = num_images < num_dims
    products = (x_ND @ x_ND.T if of_images else x_ND.T @ x_ND).astype(np.float64) / num_images
    size = len(products)
    variances_r, vectors = scipy.linalg.eigh(products, subset_by_index=(size - num_directions, size - 1))
    if of_images:
        # The images' combinations along a direction are a multiple of it. QR makes them orthonormal, also where a
        # variance is 0; from the largest on, since a column is changed by those before it.
        vectors = np.linalg.qr(x_ND.T.astype(np.float64) @ vectors[:, ::-1])[0][:, ::-1]
    return variances_r, vectors, float(np.trace(products))
