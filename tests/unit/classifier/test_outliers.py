from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import roc_auc_score

from icce_ray.classifier.outliers import fit_outlier_model, fit_outlier_rule
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import ClassifierConfig

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
    distances = np.einsum("nkd,de,nke->nk", gaps, np.linalg.inv(covariance), gaps) / 8
    other = (labels + 1) % 4
    np.testing.assert_allclose(model.score(x, labels), distances[np.arange(400), labels], rtol=1e-3)
    np.testing.assert_allclose(model.score(x, other), distances[np.arange(400), other], rtol=1e-3)
    assert model.score(x, labels).mean() == pytest.approx(1.0, abs=0.1)


def test_coordinates_are_those_along_the_directions_of_largest_variance() -> None:
    x, labels = blobs(400, 8, 0)
    x[:, 5] *= 10
    model = fit_outlier_model(x, labels, 4)
    np.testing.assert_allclose(np.abs(model.project(x, 1)[:, 0]), np.abs(x[:, 5]), atol=0.05 * np.abs(x[:, 5]).max())
    assert model.project(x, 99).shape == (400, 4)


@pytest.mark.parametrize("num_images", [40, 300])
def test_directions_are_those_of_the_covariance_whether_images_or_dimensions_are_fewer(num_images: int) -> None:
    x, labels = blobs(num_images, 120, 0)
    x *= np.linspace(0.2, 3, 120, dtype=np.float32)
    model = fit_outlier_model(x, labels, 4)
    within = x - np.stack([x[labels == k].mean(0) for k in range(4)])[labels]
    variances, vectors = np.linalg.eigh(within.T @ within / num_images)
    r = len(model.deviations)
    assert r == min(60, num_images // 4)
    np.testing.assert_allclose(model.deviations**2, variances[-r:], rtol=1e-4)
    directions = model.directions * model.deviations
    np.testing.assert_allclose(np.abs(directions.T @ vectors[:, -r:]), np.eye(r), atol=2e-3)
    assert model.noise_variance == pytest.approx(variances[:-r].sum() / (120 - r), rel=1e-3)


def test_directions_without_variance_do_not_change_those_that_have_some() -> None:
    x = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    x = np.repeat(x - x.mean(axis=0), 6, axis=0)  # 24 images, 3 dimensions
    model = fit_outlier_model(x, np.zeros(24, dtype=int), 1)
    assert len(model.deviations) == 6
    vectors = np.linalg.eigh(x.T @ x)[1][:, -3:]
    found = (model.directions * model.deviations)[:, -3:]
    np.testing.assert_allclose(np.abs(found.T @ vectors), np.eye(3), atol=2e-3)


def test_images_that_are_all_the_same_leave_directions_orthonormal() -> None:
    x = np.tile(np.random.default_rng(0).normal(size=50).astype(np.float32), (20, 1))
    model = fit_outlier_model(x, np.zeros(20, dtype=int), 1)
    directions = model.directions * model.deviations
    np.testing.assert_allclose(directions.T @ directions, np.eye(5), atol=1e-5)
    assert np.isfinite(model.score(x, np.zeros(20, dtype=int))).all()


def test_planted_foreign_points_score_higher_and_are_flagged() -> None:
    x, labels = blobs(2000, 20, 0)
    fresh, fresh_labels = blobs(2000, 20, 1)
    foreign = np.random.default_rng(3).normal(size=(200, 20)).astype(np.float32) * 6
    model, threshold = fit_outlier_rule(x, labels, 4, 0.99)
    assert (model.score(foreign, np.zeros(200, dtype=int)) > threshold).mean() > 0.9
    assert 0.003 < (model.score(fresh, fresh_labels) > threshold).mean() < 0.03


def test_few_images_of_many_dimensions_are_not_outliers_to_each_other() -> None:
    x, labels = blobs(300, 200, 0)
    fresh, fresh_labels = blobs(1000, 200, 1)
    model, threshold = fit_outlier_rule(x, labels, 4, 0.99)
    assert (model.score(fresh, fresh_labels) > threshold).mean() < 0.05
    flattered = np.quantile(model.score(x, labels), 0.99)
    assert (model.score(fresh, fresh_labels) > flattered).mean() > 0.1


def test_dimensions_that_never_change_and_empty_clusters_keep_scores_finite() -> None:
    x, labels = blobs(100, 6, 0)
    x[:, 2:] = 0
    model = fit_outlier_model(x, labels, 7)
    np.testing.assert_allclose(model.score(x, labels), fit_outlier_model(x, labels, 4).score(x, labels), rtol=1e-5)
    assert np.isfinite(model.score(x, np.full(100, 6))).all()
    moved = x.copy()
    moved[:, 4] = 1
    assert (model.score(moved, labels) > model.score(x, labels).max()).all()


@pytest.mark.slow
@pytest.mark.parametrize("same", ["cifar10_test_v1", "fmnist_2000_v1"])
def test_foreign_images_are_found_among_real_features(real_data_dir: Path, same: str) -> None:
    other = {"cifar10_test_v1": "fmnist_2000_v1", "fmnist_2000_v1": "cifar10_test_v1"}[same]
    rng = np.random.default_rng(0)  # the files are sorted by class
    x = rng.permutation(np.load(real_data_dir / f"{same}.npy"))[:4000]
    num_fresh = len(x) // 4
    fresh, seen = x[:num_fresh], x[num_fresh:]
    foreign = rng.permutation(np.load(real_data_dir / f"{other}.npy"))[:1000]
    labels = MiniBatchKMeans(10, n_init=3, random_state=0).fit_predict(seen.astype(np.float32))
    config = ClassifierConfig(num_iterations=1000)
    classifier = fit_classifier(seen, labels, config, num_clusters=10, seed=0, outlier_quantile=0.999)
    found = classifier.label(np.concatenate([fresh, foreign]))
    is_foreign = np.arange(len(found.cluster)) >= num_fresh
    assert roc_auc_score(is_foreign, found.outlier_score) > 0.95
    assert found.is_outlier[~is_foreign].mean() < 0.01
