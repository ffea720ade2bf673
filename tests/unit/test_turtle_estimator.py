from __future__ import annotations

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from icce_ray import TURTLE, clustering_accuracy
from icce_ray.errors import ConfigError, InputError

QUICK = {"inner_steps": 4, "learning_rate": 0.03}


@pytest.fixture(scope="module")
def views() -> tuple[list[np.ndarray], np.ndarray]:
    """Two feature sets with noise of their own, and the three clusters."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 300)
    sets = [(2 * np.eye(3, dim)[labels] + generator.normal(size=(300, dim))).astype(np.float32) for dim in (16, 9)]
    return sets, labels


@parametrize_with_checks([TURTLE(3, n_runs=1, n_steps=10, random_state=0, n_threads=1, turtle=QUICK)])
def test_it_keeps_the_conventions_of_scikit_learn(estimator, check) -> None:
    check(estimator)


def test_two_feature_sets_tell_more_clusters_apart_than_one(views) -> None:
    (first, second), labels = views
    both = TURTLE(3, n_runs=4, n_steps=60, random_state=0, turtle=QUICK).fit([first, second])
    assert clustering_accuracy(labels, both.labels_) > 0.92
    assert both.label_matrix_.shape == (4, 300)
    assert both.generalization_scores_[both.best_run_] == both.generalization_scores_.max()
    assert np.array_equal(both.predict([first, second]), both.labels_)
    assert not np.array_equal(both.label_matrix_[0], both.label_matrix_[3])
    assert [layer.shape for layer in both.layers_] == [(17, 3), (10, 3)]
    for features in (first, second):
        alone = TURTLE(3, n_runs=4, n_steps=60, random_state=0, turtle=QUICK).fit(features)
        assert clustering_accuracy(labels, alone.labels_) < 0.9
        assert np.array_equal(alone.predict(features), alone.labels_)


def test_bad_parameters_and_data_are_refused(views) -> None:
    (first, second), _ = views
    with pytest.raises(ConfigError, match=r"TURTLE: num_runs: 0 is not usable"):
        TURTLE(3, n_runs=0).fit(first)
    with pytest.raises(ConfigError, match="did you mean warm_start"):
        TURTLE(3, turtle={"warm_stat": True}).fit(first)
    with pytest.raises(InputError, match=r"feature sets with \[300, 299\] rows"):
        TURTLE(3).fit([first, second[:-1]])
    with pytest.raises(InputError, match="2 rows, fewer than n_clusters=3"):
        TURTLE(3).fit(first[:2])
    fitted = TURTLE(3, n_runs=1, n_steps=1, turtle=QUICK).fit([first, second])
    with pytest.raises(InputError, match=r"\[16\] dimensions; it was fitted with \[16, 9\]"):
        fitted.predict(first)
