from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import normalized_mutual_info_score
from sklearn.utils.estimator_checks import check_estimator

from icce_ray import ICCE, clustering_accuracy
from icce_ray.classifier.linear import LinearClassifier
from icce_ray.errors import ConfigError, InputError

QUICK = {"hidden_dim": 32, "bottleneck_dim": 16, "learning_rate": 5e-3, "warmup_epochs": 2}


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 60)
    centres = generator.normal(size=(5, 20)) * 2
    return (centres[labels] + generator.normal(size=(300, 20))).astype(np.float32), labels


def quick(**changes: object) -> ICCE:
    parameters = {
        "n_heads": 4, "epochs": 25, "batch_size": 64, "random_state": 0, "heads": QUICK,
        "neighbors": {"min_neighbors": 20}, "classifier": {"num_iterations": 300},
    }  # fmt: skip
    return ICCE(**({"n_clusters": 5} | parameters | changes))


@pytest.fixture(scope="module")
def fitted(blobs) -> ICCE:
    return quick().fit(blobs[0])


def test_planted_clusters_are_found(fitted: ICCE, blobs) -> None:
    assert clustering_accuracy(blobs[1], fitted.labels_) > 0.95


def test_the_fitted_attributes_are_those_promised(blobs) -> None:
    fitted = quick(epochs=1).fit(blobs[0])  # the heads don't agree yet
    assert fitted.labels_.shape == (300,)
    assert set(fitted.labels_) == set(range(5))
    assert fitted.label_matrix_.shape == (4, 300)
    assert fitted.agreement_.shape == (300,)
    assert {0.75, 1} <= set(fitted.agreement_) <= {0, 0.25, 0.5, 0.75, 1}
    np.testing.assert_array_equal(fitted.agreement_ == 1, fitted.vote_entropy_ == 0)
    with_heads = [
        normalized_mutual_info_score(fitted.labels_, labels, average_method="geometric")
        for labels in fitted.label_matrix_
    ]
    assert fitted.anmi_ == pytest.approx(np.mean(with_heads))
    assert -1 <= fitted.similarity_threshold_ <= 1
    assert fitted.head_losses_.shape == (4,)
    assert fitted.n_features_in_ == 20


def test_predictions_follow_the_consensus(fitted: ICCE, blobs) -> None:
    features, _ = blobs
    assert (fitted.predict(features) == fitted.labels_).mean() > 0.97
    probabilities = fitted.predict_proba(features)
    assert probabilities.shape == (300, 5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert np.array_equal(probabilities.argmax(axis=1), fitted.predict(features))


def test_the_same_seed_gives_the_same_labels_on_any_number_of_threads_whatever_the_true_labels(
    fitted: ICCE, blobs
) -> None:
    again = quick(n_threads=3).fit(*blobs)
    assert np.array_equal(again.labels_, fitted.labels_)
    assert np.array_equal(again.label_matrix_, fitted.label_matrix_)
    other = quick(random_state=1).fit(blobs[0])
    assert not np.array_equal(other.label_matrix_, fitted.label_matrix_)


def test_above_max_images_a_sample_is_trained_on_and_the_rest_is_labelled(blobs) -> None:
    estimator = quick(sample={"max_images": 180}).fit(blobs[0])
    took_part = estimator.label_matrix_[0] >= 0
    assert took_part.sum() == 180
    assert np.array_equal(np.isfinite(estimator.agreement_), took_part)
    assert clustering_accuracy(blobs[1], estimator.labels_) > 0.95
    alone = quick(sample={"max_images": None}).fit(blobs[0][took_part])
    assert np.array_equal(estimator.labels_[took_part], alone.labels_)
    assert np.array_equal(estimator.labels_[~took_part], alone.predict(blobs[0][~took_part]))


def test_copies_and_near_copies_are_not_trained_on_and_get_what_their_original_has(blobs) -> None:
    features, _ = blobs
    copied = np.repeat([7, 100, 250], 10)
    noise = np.random.default_rng(1).normal(0, 1e-3, (30, 20)).astype(np.float32)
    planted = np.concatenate([features, features[copied], features[copied] + noise])
    alone, estimator = quick(epochs=5).fit(features), quick(epochs=5).fit(planted)
    originals = np.concatenate([copied, copied])
    for name in ("labels_", "agreement_", "vote_entropy_"):
        values = getattr(estimator, name)
        assert np.array_equal(values[:300], getattr(alone, name))
        assert np.array_equal(values[300:], values[originals])
    assert np.array_equal(estimator.label_matrix_[:, :300], alone.label_matrix_)
    assert np.array_equal(estimator.label_matrix_[:, 300:], estimator.label_matrix_[:, originals])
    assert estimator.head_losses_.tolist() == alone.head_losses_.tolist()
    trained_on_all = quick(epochs=5, sample={"duplicate_threshold": None}).fit(planted)
    assert trained_on_all.head_losses_.tolist() != alone.head_losses_.tolist()


def test_parameters_are_kept_as_given_and_clone() -> None:
    estimator = quick(similarity_threshold=0.25)
    copy = clone(estimator)
    assert copy.get_params() == estimator.get_params()
    assert copy.set_params(n_clusters=7).n_clusters == 7


def test_the_temi_method_takes_the_best_head_and_fixed_neighbours(blobs) -> None:
    estimator = quick(method="temi", neighbors=None, epochs=1).fit(blobs[0])  # the heads don't agree yet
    assert estimator.similarity_threshold_ is None
    best = estimator.label_matrix_[estimator.head_losses_.argmin()]
    assert clustering_accuracy(best, estimator.labels_) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 0}, r"heads\.num_heads: 0 is not usable"),
        ({"similarity_threshold": 3.0}, r"similarity_threshold is 3\.0"),
        ({"preset": "dino"}, "preset: 'dino' is not usable"),
        ({"method": "dino"}, "method: 'dino' is unknown"),
        ({"method": "spectral"}, "method is 'spectral', which trains no heads; give icce, temi, scan"),
        ({"method": ["icce", "temi"]}, "trains no heads"),
        ({"heads": {"num_head": 3}}, "did you mean num_heads"),
        ({"consensus": {"extra_runs": ["a-run"]}}, "cluster_ensemble a list of label matrices"),
    ],
)
def test_bad_parameters_are_refused_by_fit_with_what_is_allowed(blobs, changes, message: str) -> None:
    estimator = quick(**changes)
    with pytest.raises(ConfigError, match=message):
        estimator.fit(blobs[0])


def test_bad_data_is_refused(blobs) -> None:
    with pytest.raises(InputError, match="3 rows, fewer than n_clusters=5"):
        quick().fit(blobs[0][:3])
    with pytest.raises(InputError, match="n_clusters=25, but only 20 rows are trained on"):
        quick(n_clusters=25, sample={"max_images": 20}).fit(blobs[0])
    with pytest.raises(ValueError, match="NaN"):
        quick().fit(np.full((10, 3), np.nan))
    with pytest.raises(NotFittedError):
        quick().predict(blobs[0])


def test_other_dimensions_are_refused_when_predicting(fitted: ICCE) -> None:
    with pytest.raises(ValueError, match="20 features"):
        fitted.predict(np.zeros((2, 19), dtype=np.float32))


def points(num_rows: int, num_different: int) -> np.ndarray:
    different = np.random.default_rng(0).normal(size=(num_different, 8)).astype(np.float32)
    return np.resize(different, (num_rows, 8))


@pytest.mark.parametrize(
    ("features", "num_clusters"),
    [
        (points(2, 2), 2),
        (points(3, 3), 3),
        (points(20, 1), 2),
        (np.zeros((20, 8), dtype=np.float32), 2),
        (points(20, 4), 5),
        (points(20, 20), 1),
    ],
    ids=["two rows", "as many clusters as rows", "all alike", "all zero", "fewer different rows than clusters", "one"],
)
def test_degenerate_data_have_a_result(features: np.ndarray, num_clusters: int) -> None:
    short = {"epochs": 2, "batch_size": 8, "classifier": {"num_iterations": 5}, "consensus": {"methods": ["mcla"]}}
    estimator = quick(n_clusters=num_clusters, **short).fit(features)
    assert estimator.labels_.shape == (len(features),)
    assert set(estimator.labels_) <= set(range(num_clusters))
    assert np.isfinite(estimator.agreement_).all()
    assert np.isfinite(estimator.predict_proba(features)).all()
    read = LinearClassifier.from_bytes(estimator.classifier_.to_bytes())
    assert np.isfinite(read.label(features).outlier_score).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_checks_of_scikit_learn_pass() -> None:
    classifier = {"num_iterations": 20, "learning_rates": [0.1]}
    short = {"epochs": 3, "batch_size": 16, "classifier": classifier, "consensus": {"methods": ["vote"]}}
    check_estimator(quick(n_clusters=2, neighbors=None, **short))
