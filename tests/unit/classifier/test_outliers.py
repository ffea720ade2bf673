from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import roc_auc_score

from icce_ray.classifier.outliers import fit_outlier_model, fit_outlier_rule

Points = npt.NDArray[np.float32]


def blobs(num_images: int, num_dims: int, seed: int) -> tuple[Points, npt.NDArray[np.int64]]:
    labels = np.random.default_rng(seed).integers(0, 4, num_images)
    means = np.random.default_rng(99).normal(size=(4, num_dims)) * 3
    x = means[labels] + np.random.default_rng(seed).normal(size=(num_images, num_dims))
    return x.astype(np.float32), labels


def test_the_score_is_the_mahalanobis_distance_under_the_model_covariance() -> None:
    x, labels = blobs(400, 8, 0)
    model = fit_outlier_model(x, labels, 4)
    directions = model.directions * model.deviations
    inside = directions @ np.diag(model.deviations**2) @ directions.T
    covariance = inside + model.noise_variance * (np.eye(8) - directions @ directions.T)
    means = np.stack([x[labels == k].mean(0) for k in range(4)])
    gaps = x[:, None] - means
    expected = np.einsum("nkd,de,nke->nk", gaps, np.linalg.inv(covariance), gaps).min(1) / 8
    np.testing.assert_allclose(model.score(x), expected, rtol=1e-3)
    assert model.score(x).mean() == pytest.approx(1.0, abs=0.1)


def test_planted_foreign_points_score_higher_and_are_flagged() -> None:
    x, labels = blobs(2000, 20, 0)
    fresh, _ = blobs(2000, 20, 1)
    foreign = np.random.default_rng(3).normal(size=(200, 20)).astype(np.float32) * 6
    model, threshold = fit_outlier_rule(x, labels, 4, 0.99)
    assert (model.score(foreign) > threshold).mean() > 0.9
    assert 0.003 < (model.score(fresh) > threshold).mean() < 0.03


def test_few_images_of_many_dimensions_are_not_outliers_to_each_other() -> None:
    x, labels = blobs(300, 200, 0)
    fresh, _ = blobs(1000, 200, 1)
    model, threshold = fit_outlier_rule(x, labels, 4, 0.99)
    assert (model.score(fresh) > threshold).mean() < 0.05
    flattered = np.quantile(model.score(x), 0.99)
    assert (model.score(fresh) > flattered).mean() > 0.1


def test_dimensions_that_never_change_and_empty_clusters_keep_scores_finite() -> None:
    x, labels = blobs(100, 6, 0)
    x[:, 2:] = 0
    model = fit_outlier_model(x, labels, 7)
    # The centre is no mean that anyone may lie near.
    np.testing.assert_allclose(model.score(x), fit_outlier_model(x, labels, 4).score(x), rtol=1e-5)
    assert np.isfinite(model.score(x)).all()
    moved = x.copy()
    moved[:, 4] = 1
    assert (model.score(moved) > model.score(x).max()).all()


@pytest.mark.parametrize("same", ["cifar10_test_v1", "fmnist_2000_v1"])
def test_foreign_images_are_found_among_real_features(real_data_dir: Path, same: str) -> None:
    other = {"cifar10_test_v1": "fmnist_2000_v1", "fmnist_2000_v1": "cifar10_test_v1"}[same]
    rng = np.random.default_rng(0)  # the files are sorted by class
    x = rng.permutation(np.load(real_data_dir / f"{same}.npy"))[:2000].astype(np.float32)
    foreign = rng.permutation(np.load(real_data_dir / f"{other}.npy"))[:1000].astype(np.float32)
    center, scale = x.mean(0), x.std()
    labels = KMeans(10, n_init=1, random_state=0).fit_predict(x[:1500])
    model = fit_outlier_model((x[:1500] - center) / scale, labels, 10)
    scores = model.score((np.concatenate([x[1500:], foreign]) - center) / scale)
    assert roc_auc_score(np.arange(1500) >= 500, scores) > 0.95
