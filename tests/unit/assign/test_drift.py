from __future__ import annotations

import json
import math

import numpy as np
import pytest

from icce_ray.assign.drift import Totals, drift_lines, stability_index, summarize_drift
from icce_ray.classifier.linear import LinearClassifier, Prediction
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import ClassifierConfig

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 900)
FEATURES = (RNG.normal(size=(900, 5)) + 4 * np.eye(5)[LABELS]).astype(np.float32)


@pytest.fixture(scope="module")
def classifier() -> LinearClassifier:
    config = ClassifierConfig(num_iterations=300)
    return fit_classifier(FEATURES[:600], LABELS[:600], config, num_clusters=3, seed=0, outlier_quantile=0.99)


def test_the_index_is_the_plain_sum() -> None:
    a, b = [10, 30, 60, 0], [40, 40, 20, 0]
    p, q = [(n + 0.5) / 101.5 for n in a[:3]], [(n + 0.5) / 101.5 for n in b[:3]]
    expected = sum((x - y) * math.log(x / y) for x, y in zip(p, q, strict=True))
    assert stability_index(a, b)["index"] == pytest.approx(expected)
    assert stability_index(a, a)["index"] == 0
    assert stability_index(a, [0, 0, 0, 0]) == {"index": 0.0, "by_chance": 0.0}
    assert math.isfinite(stability_index([0, 5], [5, 0])["index"])


def test_by_chance_is_what_two_samples_of_one_population_give() -> None:
    rng, shares = np.random.default_rng(1), [0.2, 0.3, 0.1, 0.4]
    drawn = [stability_index(rng.multinomial(500, shares), rng.multinomial(200, shares)) for _ in range(400)]
    assert np.mean([one["index"] for one in drawn]) == pytest.approx(drawn[0]["by_chance"], rel=0.15)


def test_images_like_those_of_the_run_show_no_drift_and_others_do(classifier: LinearClassifier) -> None:
    def summary(found: Prediction) -> dict[str, object]:
        return summarize_drift(Totals.of(found, 3), classifier)

    same = summary(classifier.label(FEATURES[600:]))
    assert same["cluster_shares"]["index"] < 0.1  # type: ignore[index]
    assert same["outlier_rate"]["new"] < 0.05  # type: ignore[index]
    assert same["num_images"] == 300
    half_way = FEATURES[600:] + 2 * (np.eye(5)[(LABELS[600:] + 1) % 3] - np.eye(5)[LABELS[600:]])
    shifted = summary(classifier.label(half_way))
    assert shifted["consensus_probability"]["index"] > 0.25  # type: ignore[index]
    assert shifted["outlier_rate"]["new"] == classifier.label(half_way).is_outlier.mean() > 0  # type: ignore[index]
    assert shifted["mean_consensus_probability"]["new"] < same["mean_consensus_probability"]["new"] - 0.05  # type: ignore[index]
    fewer = summary(classifier.label(FEATURES[600:][LABELS[600:] != 1]))
    assert fewer["cluster_shares"]["index"] > 0.25  # type: ignore[index]
    assert fewer["most_changed_clusters"][0] == 1  # type: ignore[index]
    assert len(drift_lines(fewer)) == 3


def test_totals_of_parts_add_up_to_those_of_all(classifier: LinearClassifier) -> None:
    parts = [Totals.of(classifier.label(FEATURES[i : i + 70]), 3, num_in_consensus=i) for i in range(0, 900, 70)]
    stored = [Totals.from_json(json.loads(json.dumps(part.to_json()))) for part in parts]
    whole = Totals.of(classifier.label(FEATURES), 3, num_in_consensus=sum(range(0, 900, 70))).metrics()
    metrics = Totals.add(stored).metrics()
    assert metrics == whole | {"mean_consensus_probability": pytest.approx(whole["mean_consensus_probability"])}
    assert metrics["num_images"] == 900
    assert (Totals.add(stored).probability_counts == sum(part.probability_counts for part in parts)).all()
