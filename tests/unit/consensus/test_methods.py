"""MCLA, HBGF, CSPA, the aligned vote, the best head and the filling of empty clusters, each against a simple reference
or a planted answer."""

from __future__ import annotations

import numpy as np
import pytest

from icce_ray.consensus import graph_cuts
from icce_ray.consensus.aligned_vote import align_and_vote, best_head, vote
from icce_ray.consensus.empty_clusters import fill_empty_clusters
from icce_ray.consensus.graph_cuts import JACCARD_SCALE, co_association, compare_heads, cspa, hbgf, mcla
from icce_ray.consensus.label_matrix import anmi, encode_heads, group_equal_images
from icce_ray.consensus.partition import PartitionError
from icce_ray.metrics.true_label_scores import clustering_accuracy


def run_mcla(heads, num_clusters):
    return mcla(heads, compare_heads(heads), num_clusters, imbalance=1.5, seeds=[0, 1])


def run_hbgf(heads, num_clusters):
    return hbgf(heads, num_clusters, imbalance=1.5, seeds=[0, 1])


def run_cspa(heads, num_clusters):
    return cspa(heads, num_clusters, imbalance=1.5, seeds=[0, 1])


def run_vote(heads, num_clusters, num_starts=1):
    return align_and_vote(heads, num_clusters, scores_H=compare_heads(heads).anmi(), seed=0, num_starts=num_starts)


def test_the_cluster_graph_holds_the_jaccard_similarities_of_a_plain_loop(planted):
    _, matrix = planted([20, 30, 10], 4, 0.3)
    matrix[2, ::7] = -1
    heads = encode_heads(matrix)
    graph = compare_heads(heads).cluster_graph().toarray()
    members = [
        set(np.flatnonzero(c == k)) for c, v in zip(heads.codes, heads.values, strict=True) for k in range(len(v))
    ]
    head_of = np.repeat(np.arange(heads.num_heads), heads.num_clusters)
    for i, one in enumerate(members):
        for j, other in enumerate(members):
            expected = len(one & other) / len(one | other) if head_of[i] != head_of[j] else 0.0
            assert graph[i, j] == pytest.approx(JACCARD_SCALE * expected, abs=1)
    np.testing.assert_array_equal(graph, graph.T)


def test_large_cluster_graphs_leave_out_overlaps_that_chance_makes(planted, monkeypatch):
    _, matrix = planted([300, 300, 5], 3, 0.02)
    heads = encode_heads(matrix)
    full = compare_heads(heads).cluster_graph().toarray()
    monkeypatch.setattr(graph_cuts, "MAX_FULL_CLUSTERS", 3)
    cut = compare_heads(heads).cluster_graph().toarray()
    limit = graph_cuts.MIN_JACCARD * JACCARD_SCALE
    assert ((full > 0) & (full < limit)).any()
    assert not cut[full < limit].any()
    np.testing.assert_array_equal(cut[full > limit], full[full > limit])


@pytest.mark.parametrize("by_mean", [True, False])
def test_the_vote_is_the_highest_mean_membership_of_a_plain_loop(planted, by_mean):
    _, matrix = planted([15, 15, 15, 15], 5, 0.4)
    matrix[1, ::5] = -1
    heads = encode_heads(matrix)
    meta_C = np.random.default_rng(0).integers(0, 3, heads.num_head_clusters)
    labels_N = vote(heads, meta_C, 3, seed=0, by_mean=by_mean)
    for image, chosen in enumerate(labels_N):
        votes = np.zeros(3)
        for head in range(heads.num_heads):
            code = heads.codes[head, image]
            if code >= 0:
                votes[meta_C[heads.offsets[head] + code]] += 1
        association = votes / np.maximum(np.bincount(meta_C, minlength=3), 1) if by_mean else votes
        assert association[chosen] == association.max()


def test_the_vote_does_not_depend_on_the_parts(planted, monkeypatch):
    _, matrix = planted([40, 40, 40], 6, 0.6)
    heads = encode_heads(matrix)
    meta_C = np.tile(np.arange(3), 6)
    whole = vote(heads, meta_C, 3, seed=1, by_mean=False)
    monkeypatch.setattr("icce_ray.consensus.label_matrix.PART_LABELS", 6 * 7)
    np.testing.assert_array_equal(whole, vote(heads, meta_C, 3, seed=1, by_mean=False))


def test_co_association_counts_shared_clusters(planted):
    _, matrix = planted([8, 8, 4], 5, 0.3)
    matrix[0, 3] = -1
    together = co_association(encode_heads(matrix)).toarray()
    for i in range(20):
        for j in range(20):
            assert together[i, j] == sum(row[i] == row[j] != -1 for row in matrix)


def test_equal_images_are_grouped_and_others_are_not(planted):
    _, matrix = planted([30, 30], 4, 0.2)
    first_G, group_N = group_equal_images(encode_heads(matrix), 2)
    assert len(first_G) == len(np.unique(matrix, axis=1).T)
    np.testing.assert_array_equal(matrix[:, first_G[group_N]], matrix)


@pytest.mark.parametrize("method", [run_mcla, run_hbgf, run_cspa])
def test_each_partition_method_recovers_planted_clusters(planted, method):
    labels_N, matrix = planted([60] * 5, 10, 0.3)
    tries = method(encode_heads(matrix), 5)
    assert len(tries) >= 2
    assert all(labels.shape == (300,) and labels.min() >= 0 and labels.max() < 5 for labels in tries)
    assert max(clustering_accuracy(labels_N, labels) for labels in tries) > 0.99


def test_mcla_and_the_vote_recover_clusters_of_very_different_size(planted):
    labels_N, matrix = planted([1000, 500, 200, 100, 50, 25, 10], 12, 0.3)
    heads = encode_heads(matrix)
    best_single = max(clustering_accuracy(labels_N, row) for row in matrix)
    for tries in (run_mcla(heads, 7), run_vote(heads, 7)):
        assert max(clustering_accuracy(labels_N, labels) for labels in tries) > max(0.98, best_single)


@pytest.mark.parametrize("method", [run_hbgf, run_cspa])
def test_fewer_different_images_than_clusters_is_a_fault_of_that_method_alone(method):
    with pytest.raises(PartitionError, match="only 2 images differ"):
        method(encode_heads([[0, 0, 1, 1, 1]]), 3)


def test_the_best_head_is_the_one_with_the_lowest_loss_with_its_own_numbers():
    matrix = np.array([[0, 0, 1, 1], [3, 3, 1, 1], [0, 1, 1, 1]])
    heads = encode_heads(matrix)
    np.testing.assert_array_equal(best_head(heads, 4, scores_H=-np.array([0.3, 0.1, 0.2])), matrix[1])
    np.testing.assert_array_equal(best_head(heads, 2, scores_H=-np.array([0.3, 0.1, 0.2])), [1, 1, 0, 0])
    np.testing.assert_array_equal(best_head(heads, 2, scores_H=-np.array([0.3, np.nan, np.nan])), matrix[0])
    np.testing.assert_array_equal(best_head(heads, 2, scores_H=np.full(3, np.nan)), matrix[0])


def test_a_head_that_leaves_out_images_or_has_too_many_clusters_cannot_be_the_best():
    heads = encode_heads([[0, 0, -1, 1], [0, 1, 2, 3]])
    np.testing.assert_array_equal(best_head(heads, 4, scores_H=np.array([1.0, 0.5])), [0, 1, 2, 3])
    with pytest.raises(PartitionError, match="no head"):
        best_head(heads, 3, scores_H=np.array([1.0, 0.5]))


def test_the_vote_copes_with_heads_that_all_have_more_clusters(planted):
    labels_N, matrix = planted([50, 50, 50, 50], 6, 0.1)
    tries = run_vote(encode_heads(matrix), 3, num_starts=3)
    assert len(tries) == 3
    assert all(sorted(np.unique(labels)) == [0, 1, 2] for labels in tries)
    assert max(clustering_accuracy(labels_N, labels) for labels in tries) > 0.7


def test_an_empty_cluster_gets_the_largest_group_that_a_head_tells_apart():
    heads = encode_heads([[0, 0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1, 1]])
    labels_N = np.zeros(9, dtype=np.int32)
    filled, num_empty = fill_empty_clusters(labels_N, heads, 3)
    assert num_empty == 2
    np.testing.assert_array_equal(filled, [0, 0, 0, 0, 2, 2, 1, 1, 1])
    assert not labels_N.any()


def test_an_empty_cluster_gets_a_group_that_the_heads_see_rather_than_what_one_odd_head_cuts_off(planted):
    """The second largest cell of the odd head is the larger one by far."""
    labels_N, matrix = planted([600, 60, 50, 40], 6, 0.1)
    matrix[0] = np.where((labels_N == 0) & (np.arange(750) % 2 == 0), 4, matrix[0])
    merged_N = np.where(labels_N == 3, 2, labels_N).astype(np.int32)
    filled_N, num_empty = fill_empty_clusters(merged_N, encode_heads(matrix), 4)
    assert num_empty == 1
    assert (filled_N == 3).sum() < 60
    assert clustering_accuracy(labels_N, filled_N) > 0.98


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_the_filled_cluster_is_the_split_with_the_highest_anmi_of_a_plain_search(planted, missing):
    labels_N, matrix = planted([40, 30, 20, 10], 5, 0.4)
    matrix[2] = 0
    matrix[1:][np.random.default_rng(0).random((4, 100)) < missing] = -1
    heads = encode_heads(matrix)
    for start_N in (np.minimum(labels_N, 2), np.zeros(100)):
        tried = []
        for cluster in np.unique(start_N):
            for codes_N in heads.codes:
                counts = np.bincount(codes_N[(start_N == cluster) & (codes_N >= 0)], minlength=4)
                for code in np.argsort(-counts, kind="stable")[1:4]:
                    if counts[code]:
                        tried.append(np.where((start_N == cluster) & (codes_N == code), 3, start_N).astype(int))
        filled_N, _ = fill_empty_clusters(start_N.astype(np.int32), heads, 4 if start_N.any() else 2)
        best = max(anmi(one, heads, 4) for one in tried)
        assert anmi(filled_N, heads, 4) == pytest.approx(best, abs=1e-12)


def test_few_promising_splits_are_nearly_as_good_as_all(planted, monkeypatch):
    _, matrix = planted([60] * 8, 8, 0.2)
    heads = encode_heads(matrix)
    start_N = (matrix[0] // 2).astype(np.int32)
    everything_N, num_empty = fill_empty_clusters(start_N, heads, 8)
    monkeypatch.setattr("icce_ray.consensus.empty_clusters.MAX_COUNTED", 0)
    few_N, _ = fill_empty_clusters(start_N, heads, 8)
    assert num_empty == 4
    assert anmi(few_N, heads, 8) > 0.95 * anmi(everything_N, heads, 8)


def test_clusters_stay_empty_where_no_head_tells_images_apart():
    heads = encode_heads([[0, 0, 1, 1]])
    filled, _ = fill_empty_clusters(np.array([0, 0, 2, 2], dtype=np.int32), heads, 4)
    np.testing.assert_array_equal(filled, [0, 0, 2, 2])


def test_filled_clusters_leave_no_gap_whatever_the_labels(planted):
    _, matrix = planted([30, 20, 10], 5, 0.5)
    heads = encode_heads(matrix)
    for num_clusters in (4, 8, 20):
        filled, _ = fill_empty_clusters(np.full(60, 1, dtype=np.int32), heads, num_clusters)
        assert len(np.unique(filled)) == num_clusters
