from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits

from icce_ray.config import NeighborsConfig
from icce_ray.neighbors import audit as audit_module
from icce_ray.neighbors import neighbor_precision as precision
from icce_ray.neighbors.audit import MAX_CLASS_SHARE, Audit, audit_features, choose_threshold
from icce_ray.neighbors.graph import build_graph
from icce_ray.neighbors.neighbor_precision import Curves
from icce_ray.sample.unit_features import prepare


def audit(features: npt.NDArray[np.floating], config: NeighborsConfig, **arguments: int) -> Audit:
    return audit_features(prepare(features, config.center), config, **arguments)


def gaussian_clusters(
    num_images: int, num_clusters: int, dim: int, separation: float, seed: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_clusters, num_images)
    centres = separation * rng.standard_normal((num_clusters, dim))
    return (centres[labels] + rng.standard_normal((num_images, dim))).astype(np.float32), labels


def true_precision(base: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], threshold: float, k: int) -> float:
    """Mean over images of the share of its neighbours with its label, by brute force."""
    cosine = base @ base.T
    np.fill_diagonal(cosine, -2)
    shares = []
    for image in range(len(base)):
        hits = np.flatnonzero(cosine[image] >= threshold)
        if len(hits) < k:
            hits = np.argsort(-cosine[image])[:k]
        shares.append((labels[hits] == labels[image]).mean())
    return float(np.mean(shares))


def test_expected_neighbours_are_those_of_the_graph_where_all_images_are_sampled() -> None:
    features, _ = gaussian_clusters(800, 5, 16, 1.0)
    config = NeighborsConfig(similarity_threshold=0.4, min_neighbors=20, max_neighbors=100)
    graph, result = build_graph(features, config, num_clusters=5, seed=0)
    assert result.num_queries == 800
    assert result.mean_neighbors == pytest.approx(graph.degrees.mean(), abs=0.01)
    row = next(row for row in result.thresholds if row["threshold"] == 0.4)
    assert row["mean_neighbors"] == result.mean_neighbors


def test_a_sample_of_images_predicts_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "MAX_QUERIES", 300)
    features, _ = gaussian_clusters(2000, 5, 16, 1.0)
    graph, result = build_graph(
        features,
        NeighborsConfig(min_neighbors=50, similarity_threshold=0.5, max_neighbors=None),
        num_clusters=5,
        seed=0,
    )
    assert result.num_queries == 300
    assert result.mean_neighbors == pytest.approx(graph.degrees.mean(), rel=0.1)


def test_histograms_count_pairs_and_the_nearest_lie_above_the_random_ones() -> None:
    features, _ = gaussian_clusters(1500, 5, 16, 1.0)
    result = audit(features, NeighborsConfig(min_neighbors=50), num_clusters=5, seed=0)
    middles = (np.array(result.bin_edges)[1:] + np.array(result.bin_edges)[:-1]) / 2
    assert sum(result.random_pairs) > 900_000
    assert sum(result.nearest_pairs) == 1500 * 50
    random_mean = np.average(middles, weights=result.random_pairs)
    cosine = prepare(features, True)[:] @ prepare(features, True)[:].T
    assert random_mean == pytest.approx(cosine.mean(), abs=0.02)
    assert np.average(middles, weights=result.nearest_pairs) > random_mean + 0.2


@pytest.mark.parametrize(("num_clusters", "dim", "separation"), [(5, 32, 0.35), (10, 64, 0.6), (20, 64, 0.5)])
def test_the_estimated_precision_follows_the_true_one(num_clusters: int, dim: int, separation: float) -> None:
    features, labels = gaussian_clusters(1200, num_clusters, dim, separation)
    prepared = prepare(features, True)
    result = audit_features(prepared, NeighborsConfig(min_neighbors=50), num_clusters=num_clusters, seed=0)
    of_interest = [row for row in result.thresholds if row["mean_neighbors"] < 1200 / num_clusters]
    for row in of_interest[:: max(1, len(of_interest) // 6)]:
        truth = true_precision(prepared[:], labels, row["threshold"], 50)
        assert row["estimated_precision"] == pytest.approx(truth, abs=0.1)


def test_auto_takes_long_lists_where_clusters_are_clear_and_short_ones_where_they_blur() -> None:
    lengths = {}
    for separation in (1.0, 0.25):
        features, _ = gaussian_clusters(2500, 5, 32, separation)
        lengths[separation] = audit(features, NeighborsConfig(min_neighbors=50), num_clusters=5, seed=0).mean_neighbors
    assert 0.8 * MAX_CLASS_SHARE * 500 < lengths[1.0] <= MAX_CLASS_SHARE * 500 + 1
    assert 50 <= lengths[0.25] < 130


LENGTHS = {0.1: 900, 0.2: 700, 0.3: 300, 0.4: 100, 0.5: 60, 0.6: 30, 0.7: 10}
"""Of lists by threshold; of 1,000 images in a class the nearest 20 are 60% of the image's own, chance is 10%."""


@pytest.mark.parametrize(
    ("precision_at", "max_neighbors", "num_images", "expected"),
    [
        # All lists are as precise as the nearest: up to 0.7 N/K.
        ({}, None, 10_000, (0.2, "700 neighbours")),
        ({0.2: 0.59, 0.3: 0.596}, None, 10_000, (0.3, "precision of 59.5%")),
        # Short lists may lose more: up to 0.1 N/K, 85% of what is above chance, and no longer than a row can be.
        ({0.1: 0.2, 0.2: 0.3, 0.3: 0.526, 0.4: 0.53, 0.5: 0.56}, None, 10_000, (0.4, "100 neighbours")),
        ({0.1: 0.2, 0.2: 0.3, 0.3: 0.5, 0.4: 0.52, 0.5: 0.53}, None, 10_000, (0.5, "precision of 52.5%")),
        ({0.1: 0.2, 0.2: 0.3, 0.3: 0.526, 0.4: 0.53, 0.5: 0.56}, 60, 10_000, (0.5, "60 neighbours")),
        # A tenth of a class of 150 is less than the 20 that all lists have.
        ({0.1: 0.2, 0.2: 0.3, 0.3: 0.5, 0.4: 0.53, 0.5: 0.56}, None, 1_500, (0.6, "precision of 59.5%")),
        (dict.fromkeys(LENGTHS, 0.1), None, 10_000, (0.7, "no better than chance")),
    ],
)
def test_auto_takes_the_longest_lists_that_lose_little(
    precision_at: dict[float, float], max_neighbors: int | None, num_images: int, expected: tuple[float, str]
) -> None:
    lengths = np.array(list(LENGTHS.values()), dtype=float)
    precision = np.array([precision_at.get(threshold, 0.6) for threshold in LENGTHS])
    curves = Curves(np.array(list(LENGTHS)), lengths, np.maximum(lengths, 20), np.zeros(7), precision, 0.6)
    threshold, reason = choose_threshold(curves, 20, max_neighbors, num_images, 10)
    assert threshold == expected[0]
    assert expected[1] in reason


@pytest.mark.parametrize("shift", [0.0, 3.0, 30.0])
def test_auto_finds_its_threshold_whatever_the_scale_of_similarities(shift: float) -> None:
    # Uncentred, a common shift pushes all cosines towards 1: 0.3 then means nothing, and neither does a step of 0.01.
    features, labels = gaussian_clusters(1500, 5, 32, 2.0)
    config = NeighborsConfig(min_neighbors=50, center=False)
    graph, result = build_graph(features + shift, config, num_clusters=5, seed=0)
    rows = np.repeat(np.arange(1500), graph.degrees)
    assert 75 < graph.degrees.mean() < 300
    assert (labels[rows] == labels[graph.indices]).mean() > 0.9
    assert result.similarity_threshold is not None
    assert result.similarity_threshold > (0.9 if shift == 30.0 else 0.0)


def test_auto_is_stable_over_seeds() -> None:
    features, _ = gaussian_clusters(1500, 5, 32, 0.4)
    lengths = [
        audit(features, NeighborsConfig(min_neighbors=50), num_clusters=5, seed=seed).mean_neighbors
        for seed in range(4)
    ]
    assert max(lengths) < 1.35 * min(lengths)


def test_the_same_seed_gives_the_same_audit_but_for_the_time() -> None:
    features, _ = gaussian_clusters(600, 5, 16, 0.5)
    first, second = (
        asdict(audit(features, NeighborsConfig(min_neighbors=50), num_clusters=5, seed=4)) for _ in range(2)
    )
    for result in (first, second):
        result.pop("predicted_s")
    assert first == second


@pytest.mark.parametrize(("num_images", "num_clusters"), [(2, 2), (3, 10), (60, 5), (200, 150)])
def test_few_images_or_many_clusters_are_no_trouble(num_images: int, num_clusters: int) -> None:
    features = np.random.default_rng(0).standard_normal((num_images, 8)).astype(np.float32)
    graph, result = build_graph(features, NeighborsConfig(min_neighbors=50), num_clusters=num_clusters, seed=0)
    assert result.similarity_threshold is not None
    assert -1 <= result.similarity_threshold <= 1
    assert (graph.degrees >= min(50, num_images - 1)).all()


@pytest.mark.parametrize("features", [np.ones((100, 4)), np.zeros((100, 4)), np.repeat(np.eye(4), 25, axis=0)])
def test_features_without_variety_are_no_trouble(features: npt.NDArray[np.float64]) -> None:
    graph, _ = build_graph(features.astype(np.float32), NeighborsConfig(min_neighbors=5), num_clusters=4, seed=0)
    assert graph.num_images == 100
    assert (graph.degrees >= 5).all()


def test_a_given_threshold_and_none_are_passed_on() -> None:
    features, _ = gaussian_clusters(300, 5, 16, 0.5)
    for threshold in (0.37, None):
        result = audit(
            features, NeighborsConfig(min_neighbors=50, similarity_threshold=threshold), num_clusters=5, seed=0
        )
        assert result.similarity_threshold == threshold
        assert not result.is_automatic
    assert result.mean_neighbors == 50


def test_an_audit_survives_json() -> None:
    features, _ = gaussian_clusters(300, 5, 16, 0.5)
    result = audit(features, NeighborsConfig(min_neighbors=50), num_clusters=5, seed=0)
    assert Audit(**json.loads(json.dumps(asdict(result)))) == result


REAL_SETS = {
    "cifar10_test_mixpca256": ("cifar10_test_labels", 0.05),
    "cifar10_test_v1": ("cifar10_test_labels", 0.07),
    "fmnist_2000_v1": ("fmnist_2000_labels", 0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_SETS)
@pytest.mark.parametrize("center", [True, False])
def test_on_real_features_auto_keeps_the_precision_it_estimates(name: str, center: bool, real_data_dir: Path) -> None:
    labels_name, tolerance = REAL_SETS[name]
    labels = np.load(real_data_dir / f"{labels_name}.npy").astype(np.int64)
    check_automatic_threshold(np.load(real_data_dir / f"{name}.npy"), labels, center, tolerance)


@pytest.mark.parametrize("center", [True, False])
def test_on_digits_auto_keeps_the_precision_of_fixed_thresholds(center: bool) -> None:
    digits = load_digits()
    check_automatic_threshold(digits.data.astype(np.float32), digits.target.astype(np.int64), center, 0.1)


def check_automatic_threshold(
    features: npt.NDArray[np.floating], labels: npt.NDArray[np.int64], center: bool, tolerance: float
) -> None:
    """Its precision is as estimated, and near the best of fixed thresholds that give as many neighbours."""
    prepared = prepare(features, center)
    base = prepared[:]
    num_clusters = len(np.unique(labels))
    result = audit_features(prepared, NeighborsConfig(min_neighbors=50), num_clusters=num_clusters, seed=0)
    rows = np.random.default_rng(1).choice(len(base), 1000, replace=False)
    cosine = base[rows] @ base.T
    cosine[np.arange(len(rows)), rows] = -2
    is_same = labels[rows][:, None] == labels[None, :]
    nearest = np.take_along_axis(is_same, np.argpartition(-cosine, 50, axis=1)[:, :50], axis=1).mean(axis=1)

    def length_and_precision(threshold: float) -> tuple[float, float]:
        is_above = cosine >= threshold
        count = is_above.sum(axis=1)
        precision = np.where(count < 50, nearest, (is_above & is_same).sum(axis=1) / np.maximum(count, 1))
        return float(np.maximum(count, 50).mean()), float(precision.mean())

    assert result.similarity_threshold is not None
    length, precision = length_and_precision(result.similarity_threshold)
    assert result.estimated_precision == pytest.approx(precision, abs=tolerance)
    fixed = [length_and_precision(tenth / 10) for tenth in range(1, 10)]
    assert precision >= max((other for longer, other in fixed if longer >= length), default=0.0) - 0.03
    assert 50 <= length <= len(labels) / num_clusters


def test_the_runs_of_k_means_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = gaussian_clusters(2000, 6, 16, 0.8)
    prepared = prepare(features, True)
    labels = []
    for num_threads in (1, 5):
        monkeypatch.setattr(precision.faiss, "omp_get_max_threads", lambda number=num_threads: number)
        labels.append(precision.cluster_labels(prepared, 6, np.random.default_rng(0)))
    assert np.array_equal(labels[0], labels[1])
    assert len({run.tobytes() for run in labels[0]}) > 1
