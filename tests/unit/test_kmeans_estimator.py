from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans as Reference
from sklearn.utils.estimator_checks import parametrize_with_checks

from icce_ray import KMeans, clustering_accuracy
from icce_ray.errors import ConfigError, InputError


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 60)
    centres = generator.normal(size=(5, 20)) * 1.2
    return (centres[labels] + generator.normal(size=(300, 20)) + 3).astype(np.float32), labels


@parametrize_with_checks([KMeans(3, n_init=2, max_iter=10, random_state=0, n_threads=1)])
def test_it_keeps_the_conventions_of_scikit_learn(estimator, check) -> None:
    check(estimator)


def test_it_finds_what_scikit_learn_finds(blobs) -> None:
    features, labels = blobs
    ours, reference = KMeans(5, random_state=1).fit(features), Reference(5, n_init=10, random_state=0).fit(features)
    assert ours.inertia_ == pytest.approx(reference.inertia_, rel=1e-3)
    assert clustering_accuracy(reference.labels_, ours.labels_) > 0.98
    assert clustering_accuracy(labels, ours.labels_) > 0.9
    means = np.stack([features[ours.labels_ == cluster].mean(axis=0) for cluster in range(5)])
    np.testing.assert_allclose(ours.cluster_centers_, means, rtol=1e-3, atol=1e-3)
    assert ours.label_matrix_.shape == (10, 300)
    assert ours.inertias_.min() == ours.inertia_
    assert ours.inertias_.argmin() == 2, "not the first start"
    assert np.array_equal(ours.label_matrix_[2], ours.labels_)


@pytest.mark.parametrize("settings", [{"n_components": 4}, {"spherical": True}, {"algorithm": "mini_batch"}])
def test_predictions_of_fitted_rows_are_their_labels(blobs, settings) -> None:
    features, labels = blobs
    estimator = KMeans(5, n_init=3, random_state=0, **settings).fit(features)
    assert np.array_equal(estimator.predict(features), estimator.labels_)
    assert clustering_accuracy(labels, estimator.labels_) > 0.9
    assert estimator.cluster_centers_.shape == (5, 20)
    lengths = np.linalg.norm(estimator.cluster_centers_ - features.mean(axis=0), axis=1)
    assert np.allclose(lengths, 1, atol=1e-3) == ("spherical" in settings)


def test_bad_parameters_and_data_are_refused(blobs) -> None:
    with pytest.raises(ConfigError, match=r"KMeans: num_starts: 0 is not usable"):
        KMeans(5, n_init=0).fit(blobs[0])
    with pytest.raises(ConfigError, match="did you mean tolerance"):
        KMeans(5, kmeans={"tolerence": 0}).fit(blobs[0])
    with pytest.raises(ConfigError, match="n_clusters is 0; at least 1"):
        KMeans(0).fit(blobs[0])
    with pytest.raises(InputError, match="3 rows, fewer than n_clusters=5"):
        KMeans(5).fit(blobs[0][:3])
