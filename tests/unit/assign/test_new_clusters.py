from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.assign import new_clusters as module
from icce_ray.assign.new_clusters import find_new_clusters, outliers_table
from icce_ray.assign.part_labeler import assignments_table
from icce_ray.classifier.linear import LinearClassifier
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import ClassifierConfig

RNG = np.random.default_rng(0)
CENTERS = 8 * np.eye(16, dtype=np.float32)
"""The first four are the known clusters."""


def draw(cluster: int, num_images: int) -> np.ndarray:
    return (CENTERS[cluster] + RNG.normal(size=(num_images, 16))).astype(np.float32)


@pytest.fixture(scope="module")
def classifier() -> LinearClassifier:
    features = np.concatenate([draw(cluster, 300) for cluster in range(4)])
    config = ClassifierConfig(num_iterations=300)
    return fit_classifier(
        features, np.repeat(np.arange(4, dtype=np.int32), 300), config, num_clusters=4, seed=0, outlier_quantile=0.999
    )


def find(classifier: LinearClassifier, features: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """The new clusters among these images, which come in two parts, and which of them are outliers."""
    prediction = classifier.label(features)
    ids = np.arange(len(features))
    uris = pa.array([f"{number}.png" for number in ids])
    table = assignments_table(ids, uris, prediction, np.full(len(ids), np.nan, np.float32))
    half = len(features) // 2
    parts = [
        outliers_table(table.slice(start, num_rows), features[start : start + num_rows], classifier, seed=0)
        for start, num_rows in ((0, half), (half, len(features) - half))
    ]
    return find_new_clusters(pa.concat_tables(parts), classifier, seed=0), prediction.is_outlier


def test_one_new_class_is_found_among_known_images_and_stray_ones(classifier: LinearClassifier) -> None:
    stray = RNG.normal(size=(12, 16)).astype(np.float32) * 12
    features = np.concatenate([draw(0, 200), draw(5, 30), stray, draw(2, 200)])
    found, is_outlier = find(classifier, features)
    assert is_outlier[200:230].all()
    assert set(found["new_cluster"].to_pylist()) == {0}
    assert found["image_id"].to_pylist() == list(range(200, 230))
    assert found["uri"].to_pylist() == [f"{number}.png" for number in range(200, 230)]


def test_several_new_classes_are_told_apart_the_largest_first(classifier: LinearClassifier) -> None:
    features = np.concatenate([draw(6, 10), draw(0, 50), draw(7, 40), draw(8, 20)])
    found, _ = find(classifier, features)
    groups = [found.filter(pa.array(found["new_cluster"].to_numpy() == group))["image_id"] for group in range(3)]
    assert [group.to_pylist() for group in groups] == [list(range(60, 100)), list(range(100, 120)), list(range(10))]


def test_outliers_without_anything_in_common_are_no_cluster(classifier: LinearClassifier) -> None:
    found, is_outlier = find(classifier, RNG.normal(size=(60, 16)).astype(np.float32) * 12)
    assert is_outlier.sum() > 50
    assert len(found) == 0
    assert len(find(classifier, draw(1, 100))[0]) == 0


@pytest.mark.parametrize(("distance", "num_found"), [(0.8, 0), (1.2, 40)])
def test_a_group_near_a_known_cluster_is_no_new_one(
    classifier: LinearClassifier, distance: float, num_found: int
) -> None:
    """The group is as wide as the known clusters, and so many times that from the mean of one."""
    width, ids = np.sqrt(classifier.outliers.total_variance), np.arange(40)
    x = classifier.outliers.cluster_means[0] + distance * width * np.eye(16)[9]
    noise = RNG.normal(size=(40, 16))
    x = x + (noise - noise.mean(axis=0)) * width / 4
    table = pa.table({"image_id": ids, "uri": ids.astype(str), "cluster": np.zeros(40, np.int32)})
    table = table.append_column("x", pa.FixedSizeListArray.from_arrays(pa.array(x.ravel().astype(np.float32)), 16))
    assert len(find_new_clusters(table, classifier, seed=0)) == num_found


def test_of_too_many_outliers_a_sample_is_clustered(
    classifier: LinearClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_OUTLIERS", 20)
    found, _ = find(classifier, draw(9, 100))
    assert len(found) == 20
    assert np.ptp(found["image_id"].to_numpy()) > 50
