from __future__ import annotations

import numpy as np
import pytest

from icce_ray.assign import labeling
from icce_ray.assign.labeling import assignments_table, label_images, new_table
from icce_ray.classifier.linear import LinearClassifier
from icce_ray.classifier.self_training import fit_classifier
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
    found, agreement = label_images(classifier, FEATURES, consensus, np.full(300, 0.7, dtype=np.float32))
    assert (found.cluster[1::2] == consensus[1::2]).all()
    assert (found.cluster[::2] == classifier.predict(FEATURES)[::2]).all()
    assert np.isnan(agreement[::2]).all()
    assert (agreement[1::2] == np.float32(0.7)).all()


def test_one_switch_lets_the_classifier_label_all(
    classifier: LinearClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labeling, "CONSENSUS_WINS", False)
    found, _ = label_images(classifier, FEATURES, (TRUE + 1) % 3, np.ones(300))
    assert (found.cluster == classifier.predict(FEATURES)).all()


def test_an_agreement_that_is_not_known_is_null_in_the_table(classifier: LinearClassifier) -> None:
    found, agreement = label_images(classifier, FEATURES[:3], np.array([0, -1, 2]), np.array([0.5, np.nan, 1.0]))
    uris = ["a", "b", "c"]
    table = assignments_table(np.array([3, 5, 9]), uris, found, agreement, np.array([True, False, False]))
    assert table.schema == labeling.SCHEMA
    assert table["agreement"].to_pylist() == [0.5, None, 1.0]
    assert table["is_exemplar"].to_pylist() == [True, False, False]
    assert table["uri"].to_pylist() == uris
    new = new_table(np.array([3, 5, 9]), uris, found)
    assert new.schema == labeling.NEW_SCHEMA
    shared = ["image_id", "uri", "cluster", "confidence", "second_choice", "is_outlier"]
    assert new.select(shared) == table.select(shared)
