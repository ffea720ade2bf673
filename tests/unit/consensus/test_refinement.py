from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icce_ray.consensus import refinement
from icce_ray.consensus.label_matrix import anmi, count_consensus, encode_heads
from icce_ray.consensus.refinement import refine
from icce_ray.metrics.true_label_scores import clustering_accuracy


@given(seed=st.integers(0, 10_000), num_clusters=st.integers(2, 6), missing=st.sampled_from([0.0, 0.3]))
@settings(max_examples=40)
def test_refinement_never_lowers_the_anmi_nor_empties_a_cluster(seed, num_clusters, missing):
    rng = np.random.default_rng(seed)
    matrix = rng.integers(0, 4, (4, 50))
    matrix[1:][rng.random((3, 50)) < missing] = -1
    heads = encode_heads(matrix)
    start_N = rng.integers(0, num_clusters, 50)
    labels_N, value = refine(start_N, heads, num_clusters)
    assert labels_N.dtype == np.int32
    assert value >= anmi(start_N, heads, num_clusters)
    assert value == pytest.approx(anmi(labels_N, heads, num_clusters), abs=1e-12)
    assert set(np.unique(labels_N)) == set(np.unique(start_N))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_the_gain_of_a_move_equals_the_change_of_the_anmi(planted, missing, dense, monkeypatch):
    if not dense:
        monkeypatch.setattr(refinement, "MAX_DENSE_CLUSTERS", 2)
        monkeypatch.setattr(refinement, "MIN_RIVAL_SHARE", 0.0)
    _, matrix = planted([400, 200, 100], 5, 0.3)
    rng = np.random.default_rng(0)
    matrix[1:][rng.random((4, 700)) < missing] = -1
    heads = encode_heads(matrix)
    labels_N = matrix[0].astype(np.int32)
    start = anmi(labels_N, heads, 3)
    target_N, gain_N = refinement._best_moves(labels_N, count_consensus(labels_N, heads, 3), heads)
    for image in range(0, 700, 13):
        change_of = {}
        for cluster in set(range(3)) - {int(labels_N[image])}:
            moved_N = labels_N.copy()
            moved_N[image] = cluster
            change_of[cluster] = anmi(moved_N, heads, 3) - start
        best = max(change_of.values())
        if gain_N[image] == 0:  # no head votes for another cluster
            assert not dense
            assert best < 0
            continue
        assert gain_N[image] == pytest.approx(change_of[int(target_N[image])], abs=3e-6)
        assert change_of[int(target_N[image])] > best - 6e-6 or (not dense and best < 0)
    assert np.count_nonzero(gain_N) > 300


def test_moves_that_lower_the_anmi_together_are_taken_back(planted, monkeypatch):
    labels_N, matrix = planted([50, 50], 5, 0.1)
    heads = encode_heads(matrix)
    start = anmi(labels_N, heads, 2)
    gain_N = np.arange(100) % 2 - 0.5
    monkeypatch.setattr(refinement, "_best_moves", lambda *_: ((1 - labels_N).astype(np.int32), gain_N))
    refined_N, value = refine(labels_N, heads, 2)
    assert value == start
    np.testing.assert_array_equal(refined_N, labels_N)


def test_of_moves_that_lower_the_anmi_together_the_half_with_the_higher_gains_is_tried(planted, monkeypatch):
    labels_N, matrix = planted([50, 50], 5, 0.0)
    heads = encode_heads(matrix)
    spoilt = np.array([3, 8, 40, 55, 91])
    harmful = np.array([0, 20, 44, 60, 77, 99])
    start_N = labels_N.astype(np.int32)
    start_N[spoilt] = 1 - start_N[spoilt]
    gain_N = np.zeros(100)
    gain_N[spoilt], gain_N[harmful] = 0.2, 0.1
    monkeypatch.setattr(refinement, "_best_moves", lambda *_: (1 - start_N, gain_N))
    refined_N, value = refine(start_N, heads, 2, max_passes=1)
    np.testing.assert_array_equal(refined_N, labels_N)
    assert value == pytest.approx(1.0)


def test_a_cluster_keeps_its_images_when_all_of_them_would_leave():
    heads = encode_heads([[0, 0, 0, 0, 1, 1, 1, 1]])
    start_N = np.array([0, 0, 0, 2, 1, 1, 1, 1])
    labels_N, value = refine(start_N, heads, 3)
    np.testing.assert_array_equal(labels_N, start_N)
    assert value < 1.0


def test_refinement_repairs_a_spoilt_planted_clustering(planted):
    labels_N, matrix = planted([500, 200, 100, 50, 25], 12, 0.3)
    heads = encode_heads(matrix)
    rng = np.random.default_rng(1)
    start_N = np.where(rng.random(len(labels_N)) < 0.5, rng.integers(0, 5, len(labels_N)), labels_N)
    refined_N, _ = refine(start_N, heads, 5)
    assert clustering_accuracy(labels_N, refined_N) > 0.99


def test_voted_candidates_lead_to_the_same_clusters_as_all_of_them(planted, monkeypatch):
    labels_N, matrix = planted([60] * 6, 8, 0.3)
    heads = encode_heads(matrix)
    rng = np.random.default_rng(1)
    start_N = np.where(rng.random(360) < 0.2, rng.integers(0, 6, 360), labels_N)
    everywhere_N, _ = refine(start_N, heads, 6)
    monkeypatch.setattr(refinement, "MAX_DENSE_CLUSTERS", 2)
    voted_N, _ = refine(start_N, heads, 6)
    np.testing.assert_array_equal(everywhere_N, voted_N)


def test_only_images_with_a_rival_are_looked_at_and_the_others_would_not_have_moved(planted, monkeypatch):
    _, matrix = planted([60] * 6, 8, 0.4)
    heads = encode_heads(matrix)
    labels_N = matrix[0].astype(np.int32)
    counts_KC = count_consensus(labels_N, heads, 6)
    _, every_gain_N = refinement._best_moves(labels_N, counts_KC, heads)
    monkeypatch.setattr(refinement, "MAX_DENSE_CLUSTERS", 2)
    _, gain_N = refinement._best_moves(labels_N, counts_KC, heads)
    untouched = gain_N == 0
    assert 0.1 < untouched.mean() < 0.9
    assert every_gain_N[untouched].max() < 0
    np.testing.assert_allclose(gain_N[gain_N > 0], every_gain_N[gain_N > 0], atol=1e-12)


def test_blocks_do_not_change_the_refinement(planted, monkeypatch):
    _, matrix = planted([60] * 4, 6, 0.5)
    heads = encode_heads(matrix)
    whole_N, _ = refine(matrix[0], heads, 4)
    monkeypatch.setattr(refinement, "PART_LABELS", 31 * 6 * 4)
    blocks_N, _ = refine(matrix[0], heads, 4)
    np.testing.assert_array_equal(whole_N, blocks_N)


def test_heads_of_a_single_cluster_and_a_perfect_start_change_nothing():
    single = encode_heads(np.zeros((3, 10), dtype=int))
    start_N = np.arange(10) % 2
    labels_N, _ = refine(start_N, single, 2)
    np.testing.assert_array_equal(labels_N, start_N)
    agreed = encode_heads(np.tile(start_N, (3, 1)))
    labels_N, value = refine(start_N, agreed, 2)
    np.testing.assert_array_equal(labels_N, start_N)
    assert value == pytest.approx(1.0)
