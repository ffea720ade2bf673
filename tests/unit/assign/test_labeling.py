from __future__ import annotations

import numpy as np
import pytest

from icce_ray.assign import labeling
from icce_ray.assign.labeling import assignments_table, label_images
from icce_ray.classifier.linear import LinearClassifier, fit_classifier
from icce_ray.config import ClassifierConfig

RNG = np.random.default_rng(0)
TRUE = RNG.integers(0, 3, 300)
FEATURES = (RNG.normal(size=(300, 5)) + 4 * np.eye(5)[TRUE]).astype(np.float32)


@pytest.fixture(scope="module")
def classifier() -> LinearClassifier:
    config = ClassifierConfig(num_iterations=300)
    return fit_classifier(FEATURES, TRUE, config, num_clusters=3, seed=0, outlier_quantile=0.99)


def test_images_of_the_consensus_keep_its_label_and_others_get_the_classifiers(classifier: LinearClassifier) -> None:
    consensus = (TRUE + 1) % 3
    consensus[::2] = -1
    labels = label_images(classifier, FEATURES, consensus, np.full(300, 0.7, dtype=np.float32))
    assert (labels.cluster[1::2] == consensus[1::2]).all()
    assert (labels.cluster[::2] == classifier.predict(FEATURES)[::2]).all()
    assert np.isnan(labels.agreement[::2]).all()
    assert (labels.agreement[1::2] == np.float32(0.7)).all()


def test_one_switch_lets_the_classifier_label_all(
    classifier: LinearClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labeling, "CONSENSUS_WINS", False)
    labels = label_images(classifier, FEATURES, (TRUE + 1) % 3, np.ones(300))
    assert (labels.cluster == classifier.predict(FEATURES)).all()


def test_confidence_is_the_probability_of_the_assigned_cluster_and_second_choice_the_best_other(
    classifier: LinearClassifier,
) -> None:
    consensus = (TRUE + 1) % 3
    labels = label_images(classifier, FEATURES, consensus, np.ones(300))
    p = classifier.predict_proba(FEATURES)
    for row in range(300):
        assert labels.confidence[row] == p[row, consensus[row]]
        others = [k for k in range(3) if k != consensus[row]]
        assert labels.second_choice[row] == max(others, key=lambda k, row=row: p[row, k])


def test_new_images_need_no_consensus(classifier: LinearClassifier) -> None:
    labels = label_images(classifier, FEATURES[:4].astype(np.float16))
    assert (labels.cluster == TRUE[:4]).all()
    assert np.isnan(labels.agreement).all()
    assert (labels.is_outlier == classifier.is_outlier(FEATURES[:4].astype(np.float16))).all()


def test_an_agreement_that_is_not_known_is_null_in_the_table(classifier: LinearClassifier) -> None:
    consensus = np.array([0, -1, 2])
    labels = label_images(classifier, FEATURES[:3], consensus, np.array([0.5, np.nan, 1.0]))
    uris = ["a", "b", "c"]
    table = assignments_table(np.array([3, 5, 9]), uris, labels, np.array([True, False, False]))
    assert table.schema == labeling.SCHEMA
    assert table["agreement"].to_pylist() == [0.5, None, 1.0]
    assert table["is_exemplar"].to_pylist() == [True, False, False]
    assert table["uri"].to_pylist() == uris
