from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest
import scipy.sparse as sp

from icce_ray.consensus import hgpa as hgpa_module
from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.consensus.hgpa import hgpa
from icce_ray.consensus.label_matrix import encode_heads
from icce_ray.consensus.partition import PartitionError, partition_hypergraph
from icce_ray.metrics.true_label_scores import clustering_accuracy

needs_mtkahypar = pytest.mark.skipif(
    importlib.util.find_spec("mtkahypar") is None, reason="Mt-KaHyPar, the extra [hgpa], is not installed"
)


def cost(members_EV, edge_weights, parts):
    """Weight of each hyperedge times the parts it touches beyond the first."""
    return sum(w * (len(set(parts[row > 0])) - 1) for w, row in zip(edge_weights, members_EV, strict=True))


@needs_mtkahypar
def test_the_cut_is_the_best_of_all_balanced_ones():
    rng = np.random.default_rng(0)
    for _ in range(5):
        members_EV = (rng.random((6, 8)) < 0.5).astype(np.int8)
        members_EV[:, :2] = 1
        weights = rng.integers(1, 9, 6)
        balanced = [np.array(p) for p in itertools.product((0, 1), repeat=8) if sum(p) == 4]
        best = min(cost(members_EV, weights, parts) for parts in balanced)
        parts = partition_hypergraph(
            sp.csr_array(members_EV), 2, edge_weights=weights, vertex_weights=np.ones(8), imbalance=1.01, seeds=[0]
        )[0]
        assert np.bincount(parts).tolist() == [4, 4]
        assert cost(members_EV, weights, parts) == best


@needs_mtkahypar
def test_planted_clusters_are_recovered_the_same_way_each_time(planted):
    # Little noise: a cluster with a few images of every other costs the same wherever it is cut.
    labels_N, matrix = planted([60] * 5, 10, 0.02)
    matrix[0, ::5] = -1
    first, second = (hgpa(encode_heads(matrix), 5, imbalance=1.1, seeds=[3]) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    assert clustering_accuracy(labels_N, first[0]) > 0.95
    result = cluster_ensemble(matrix, 5, methods=["hgpa", "vote"], random_state=0)
    assert set(result.anmi) == {"hgpa", "vote"}


def test_without_mt_kahypar_the_function_is_skipped_with_the_remedy(planted, monkeypatch):
    _, matrix = planted([30, 30], 4, 0.1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = cluster_ensemble(matrix, 2, methods=["hgpa", "vote"], random_state=0)
    assert result.skipped == {"hgpa": "Mt-KaHyPar is not installed: pip install 'icce_ray[hgpa]'"}
    assert result.method == "vote"


def test_large_hypergraphs_and_too_few_different_images_are_left_out_with_the_number(planted, monkeypatch):
    _, matrix = planted([30, 30], 4, 0.1)
    with pytest.raises(PartitionError, match="only 2 images differ"):
        hgpa(encode_heads([[0, 0, 1, 1, 1]]), 3, imbalance=1.5, seeds=[0])
    monkeypatch.setattr(hgpa_module, "MAX_PINS", 200)
    with pytest.raises(PartitionError, match="240 pins"):
        hgpa(encode_heads(matrix), 2, imbalance=1.5, seeds=[0])
