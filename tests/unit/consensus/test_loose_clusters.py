"""Splits on the graph against a plain loop over all cuts; groups that no head separates are found."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from icce_ray.consensus import graph_choice
from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.consensus.graph_choice import RECOMBINED, best_split, replace_loose_clusters, to_matrix
from icce_ray.consensus.label_matrix import encode_heads
from icce_ray.consensus.neighbor_score import NeighborScore
from icce_ray.consensus.partition import PartitionError


def joined_groups(near, sizes, purity=0.9):
    """Groups (N,), and the score of a graph that knows them, of three heads that put all images into one cluster but
    the last group."""
    groups_N = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    heads_HN = np.tile(np.where(groups_N == len(sizes) - 1, 1, 0), (3, 1))
    return groups_N, NeighborScore(encode_heads(heads_HN), near(groups_N, purity))


def shares_of(weights_NN, parts):
    return sum(weights_NN[np.ix_(part, part)].sum() / max(weights_NN[part].sum(), 1) for part in parts)


@pytest.mark.parametrize("dense", [200, 3])
def test_a_split_is_the_best_of_all_cuts_in_the_order_of_the_eigenvector(near, monkeypatch, dense):
    monkeypatch.setattr(graph_choice, "DENSE_IMAGES", dense)
    groups_N, score = joined_groups(near, [40, 15, 30])
    matrix, images_n = to_matrix(score), np.flatnonzero(groups_N < 2)
    gain, part = best_split(matrix, score.degree_N, images_n)
    weights_NN = matrix.toarray()
    within = weights_NN[np.ix_(images_n, images_n)]
    degree_n = within.sum(axis=1)
    values, vectors = np.linalg.eigh(within / np.sqrt(np.outer(degree_n, degree_n)))
    order = images_n[np.argsort(vectors[:, np.argsort(values)[-2]] / np.sqrt(degree_n))]
    gains = [shares_of(weights_NN, (order[:cut], order[cut:])) for cut in range(1, len(order))]
    assert gain == pytest.approx(max(gains) - shares_of(weights_NN, [images_n]), abs=1e-12)
    rest = np.setdiff1d(images_n, part)
    assert shares_of(weights_NN, (part, rest)) == pytest.approx(max(gains), abs=1e-12)
    assert {len(part), len(rest)} == {40, 15}


def test_parts_without_edges_between_them_are_told_apart(near):
    groups_N, score = joined_groups(near, [20, 10, 5], purity=1.0)
    gain, part = best_split(to_matrix(score), score.degree_N, np.flatnonzero(groups_N < 2))
    assert len(np.unique(groups_N[part])) == 1
    assert gain == pytest.approx(1.0)
    assert best_split(to_matrix(score), score.degree_N, part[:1])[0] == -np.inf
    assert len(best_split(to_matrix(score), score.degree_N, part[:2])[1]) == 1


def test_loose_clusters_give_way_to_groups_that_no_head_separates(near):
    groups_N, score = joined_groups(near, [80, 30, 15, 40], purity=0.95)
    labels_N = np.where(groups_N == 3, 4, 0).astype(np.int32)
    labels_N[[3, 7]] = 1, 2
    found_N = replace_loose_clusters(score, labels_N, *score.shares([labels_N], 6))
    assert sorted(np.unique(found_N)) == [0, 1, 2, 4]
    assert adjusted_rand_score(groups_N, found_N) > 0.97
    np.testing.assert_array_equal(found_N == 4, groups_N == 3)
    again_N = replace_loose_clusters(score, found_N, *score.shares([found_N], 6))
    np.testing.assert_array_equal(again_N, found_N)


def test_a_consensus_of_heads_that_merge_small_groups_separates_them(near):
    groups_N = np.repeat([0, 1, 2, 3], [200, 60, 25, 20])
    matrix = np.tile(np.where(groups_N == 3, 2, groups_N), (4, 1))
    matrix[1, :40] = 1
    found = cluster_ensemble(matrix, 4, methods=["vote"], random_state=0, neighbors=near(groups_N, 0.97))
    assert found.method == RECOMBINED
    assert adjusted_rand_score(groups_N, found.labels) > 0.97
    assert adjusted_rand_score(groups_N, cluster_ensemble(matrix, 4, methods=["vote"]).labels) < 0.95


def test_a_graph_that_is_too_large_to_read_as_a_whole_is_refused(near, monkeypatch):
    _, score = joined_groups(near, [20, 10, 5])
    monkeypatch.setattr(graph_choice, "MAX_EDGES", 300)
    labels_N = np.r_[1, np.zeros(34, int)].astype(np.int32)
    with pytest.raises(PartitionError, match="350 edges are over the limit of 300"):
        replace_loose_clusters(score, labels_N, *score.shares([labels_N], 2))
