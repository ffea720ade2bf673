from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from icce_ray.assign.exemplars import farthest_first, pick_exemplars
from icce_ray.classifier.linear import LinearClassifier
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import ClassifierConfig

RNG = np.random.default_rng(0)
LABELS = np.sort(RNG.integers(0, 3, 600))
FEATURES = (RNG.normal(size=(600, 5)) + 3 * np.eye(5)[LABELS]).astype(np.float32)
AGREEMENT = RNG.random(600).astype(np.float32)


@pytest.fixture(scope="module")
def classifier() -> LinearClassifier:
    config = ClassifierConfig(num_iterations=300)
    return fit_classifier(FEATURES, LABELS, config, num_clusters=4, seed=0, outlier_quantile=0.99)


def pick(classifier: LinearClassifier, **changes: object) -> list[npt.NDArray[np.int64]]:
    settings = {"consensus_N": LABELS, "agreement_N": AGREEMENT, "num_exemplars": 5, "seed": 0} | changes
    return pick_exemplars(FEATURES, classifier=classifier, **settings)  # type: ignore[arg-type]


def test_each_cluster_gets_its_own_images_once_and_an_empty_one_none(classifier: LinearClassifier) -> None:
    picked = pick(classifier)
    assert [len(rows) for rows in picked] == [5, 5, 5, 0]
    for cluster, rows in enumerate(picked):
        assert len(set(rows)) == len(rows)
        assert (LABELS[rows] == cluster).all()


def test_exemplars_have_high_agreement_and_confidence(classifier: LinearClassifier) -> None:
    picked = pick(classifier)
    confidence = classifier.predict_proba(FEATURES).max(1)
    for cluster, rows in enumerate(picked[:3]):
        inside = cluster == LABELS
        assert AGREEMENT[rows].min() > np.median(AGREEMENT[inside])
        assert confidence[rows].min() > np.quantile(confidence[inside], 0.25)


def test_exemplars_are_more_diverse_than_as_many_at_random(classifier: LinearClassifier) -> None:
    def nearest(rows: npt.NDArray[np.int64]) -> float:
        gaps = np.linalg.norm(FEATURES[rows][:, None] - FEATURES[rows][None], axis=2)
        return float((gaps + 1e9 * np.eye(len(rows))).min())

    rng = np.random.default_rng(1)
    for cluster, rows in enumerate(pick(classifier)[:3]):
        inside = np.flatnonzero(cluster == LABELS)
        assert nearest(rows) > np.mean([nearest(rng.choice(inside, 5, replace=False)) for _ in range(30)])


def test_the_pick_is_the_same_for_the_same_seed(classifier: LinearClassifier) -> None:
    even = np.full(600, 0.5, dtype=np.float32)
    first, again = pick(classifier, agreement_N=even), pick(classifier, agreement_N=even)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first[:3], pick(classifier, agreement_N=even, seed=1)[:3], strict=True))


def test_images_outside_the_consensus_are_no_exemplars(classifier: LinearClassifier) -> None:
    partly = np.where(np.arange(600) % 3 == 0, LABELS, -1)
    for rows in pick(classifier, consensus_N=partly):
        assert (rows % 3 == 0).all()


def test_a_small_cluster_gives_all_it_has(classifier: LinearClassifier) -> None:
    small = np.where(LABELS == 1, -1, LABELS)
    small[LABELS.searchsorted(1)] = 1
    assert pick(classifier, consensus_N=small)[1].tolist() == [LABELS.searchsorted(1)]


def test_farthest_first_starts_in_the_middle_and_goes_to_the_ends() -> None:
    line = np.array([[0.0], [5.1], [10.0], [4.8], [5.0]], dtype=np.float32)
    assert farthest_first(line, 3).tolist() == [4, 0, 2]
    assert sorted(farthest_first(line, 9)) == [0, 1, 2, 3, 4]
    assert sorted(farthest_first(np.zeros((3, 2), dtype=np.float32), 3)) == [0, 1, 2]
