from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from icce_ray.errors import InputError
from icce_ray.metrics.true_label_scores import (
    clustering_accuracy,
    contingency_table,
    evaluate_clustering,
    match_to_classes,
    metrics_from_counts,
    normalized_mutual_info,
)


def plain_accuracy(true_N, pred_N):
    """Every one-to-one matching is tried; leftover clusters go to their majority class. The best of the matchings with
    most images."""
    classes, clusters = sorted(set(true_N)), sorted(set(pred_N))
    count = {(c, k): int(sum((true_N == c) & (pred_N == k))) for c in classes for k in clusters}
    size = min(len(classes), len(clusters))
    best = (-1, 0)
    for chosen_clusters in itertools.combinations(clusters, size):
        leftover = sum(max(count[c, k] for c in classes) for k in clusters if k not in chosen_clusters)
        for chosen_classes in itertools.permutations(classes, size):
            matched = sum(count[pair] for pair in zip(chosen_classes, chosen_clusters, strict=True))
            best = max(best, (matched, leftover))
    return best[0], sum(best) / len(true_N)


@given(seed=st.integers(0, 10_000), num_classes=st.integers(1, 4), num_clusters=st.integers(1, 4))
@settings(max_examples=60)
def test_accuracy_equals_a_search_over_all_matchings(seed, num_classes, num_clusters):
    rng = np.random.default_rng(seed)
    true_N, pred_N = rng.integers(0, num_classes, 30), rng.integers(0, num_clusters, 30)
    matched, accuracy = plain_accuracy(true_N, pred_N)
    found = clustering_accuracy(true_N, pred_N)
    if num_clusters <= num_classes:
        assert found == pytest.approx(accuracy)
    assert matched / 30 - 1e-12 <= found <= accuracy + 1e-12


@given(seed=st.integers(0, 10_000), n=st.integers(1, 60))
@settings(max_examples=60)
def test_nmi_and_ari_equal_scikit_learn(seed, n):
    rng = np.random.default_rng(seed)
    true_N, pred_N = rng.integers(0, 5, n), rng.integers(0, rng.integers(1, 8), n)
    found = evaluate_clustering(true_N, pred_N)
    assert found["ari"] == pytest.approx(adjusted_rand_score(true_N, pred_N), abs=1e-12)
    for name, mean in (("nmi", "geometric"), ("nmi_arithmetic", "arithmetic")):
        expected = normalized_mutual_info_score(true_N, pred_N, average_method=mean)
        assert found[name] == pytest.approx(expected, abs=1e-12)
    assert normalized_mutual_info(true_N, pred_N) == found["nmi"]


def test_renaming_clusters_changes_nothing_and_a_perfect_clustering_scores_one():
    rng = np.random.default_rng(0)
    true_N, pred_N = rng.integers(0, 6, 500), rng.integers(0, 6, 500)
    renamed_N = np.array([40, -7, 10**12, 3, 99, 0])[pred_N]
    assert evaluate_clustering(true_N, renamed_N) == pytest.approx(evaluate_clustering(true_N, pred_N))
    assert list(evaluate_clustering(true_N, (true_N + 3) % 6).values()) == pytest.approx([1.0] * 5)


def test_leftover_clusters_count_for_their_majority_class():
    true_N = np.array([0, 0, 0, 0, 1, 1, 1, 0])
    pred_N = np.array([0, 0, 2, 2, 1, 1, 3, 3])
    assert clustering_accuracy(true_N, pred_N) == pytest.approx(7 / 8)
    assert evaluate_clustering(true_N, pred_N)["many_to_one"] == pytest.approx(7 / 8)
    assert clustering_accuracy(pred_N, true_N) == pytest.approx(4 / 8)


def test_each_cluster_is_matched_to_one_class():
    table = contingency_table([0, 0, 1, 1, 2, 2], [5, 5, 5, 7, 7, 7])
    assert table.toarray().tolist() == [[2, 0], [1, 1], [0, 2]]
    assert match_to_classes(table).tolist() == [0, 2]


def test_metrics_of_added_shards_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    true_N, pred_N = rng.integers(0, 4, 300), rng.integers(0, 5, 300)
    tables = [contingency_table(true_N[part], pred_N[part]) for part in (slice(0, 150), slice(150, 300))]
    assert metrics_from_counts(tables[0] + tables[1]) == evaluate_clustering(true_N, pred_N)


def test_a_million_labels_of_a_thousand_classes_are_counted_exactly():
    rng = np.random.default_rng(0)
    true_N = rng.integers(0, 1000, 1_000_000)
    pred_N = np.where(rng.random(1_000_000) < 0.75, (true_N * 7) % 1000, rng.integers(0, 1000, 1_000_000))
    metrics = evaluate_clustering(true_N, pred_N)
    assert metrics["acc"] == pytest.approx(np.mean((true_N * 7) % 1000 == pred_N))
    assert metrics["ari"] == pytest.approx(0.75**2, abs=0.01)


def test_a_billion_images_are_counted_exactly():
    cells = np.array([[400_000_001, 3, 0], [5, 299_999_999, 7], [1, 0, 300_000_011]])
    metrics = metrics_from_counts(sp.csr_array(cells))
    together, rows, columns, total = (
        sum(n * (n - 1) // 2 for n in counts.ravel().tolist())
        for counts in (cells, cells.sum(axis=1), cells.sum(axis=0), cells.sum())
    )
    expected = Fraction(rows * columns, total)
    exact = (together - expected) / (Fraction(rows + columns, 2) - expected)
    assert metrics["ari"] == float(exact)
    assert metrics["acc"] == int(np.trace(cells)) / int(cells.sum())


def test_strings_and_booleans_are_labels():
    assert clustering_accuracy(["cat", "cat", "dog"], [1, 1, 0]) == 1.0
    assert clustering_accuracy([True, False], np.array([0, 1])) == 1.0


@pytest.mark.parametrize(
    ("true", "pred", "message"),
    [
        ([0, 1], [0], "2 labels and y_pred 1"),
        ([], [], r"shape \(0,\)"),
        ([[0, 1]], [0, 1], "y_true has shape"),
        ([0, 1], [0.5, 1.0], "float64"),
    ],
)
def test_labels_that_cannot_be_compared_are_refused(true, pred, message):
    with pytest.raises(InputError, match=message):
        clustering_accuracy(true, pred)
