from __future__ import annotations

import itertools

import numpy as np
import pytest

from icce_ray.consensus.aligned_vote import align_heads, describe_clusters, measure_agreement
from icce_ray.consensus.label_matrix import count_consensus, encode_heads


def test_heads_with_as_many_clusters_are_aligned_by_the_best_of_all_permutations(planted):
    labels_N, matrix = planted([30, 20, 10, 5], 3, 0.4)
    heads = encode_heads(matrix)
    counts_KC = count_consensus(labels_N, heads, 4)
    aligned_C = align_heads(counts_KC, heads.offsets)
    for start, stop in itertools.pairwise(heads.offsets):
        table = counts_KC[:, start:stop]
        best = max(sum(table[row, code] for code, row in enumerate(p)) for p in itertools.permutations(range(4)))
        assert sorted(aligned_C[start:stop]) == [0, 1, 2, 3]
        assert table[aligned_C[start:stop], np.arange(4)].sum() == best


def test_heads_with_other_numbers_of_clusters_are_aligned_by_majority():
    labels_N = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    heads = encode_heads([[0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 3, 3, 4]])
    aligned_C = align_heads(count_consensus(labels_N, heads, 3), heads.offsets)
    np.testing.assert_array_equal(aligned_C, [0, 2, 0, 0, 1, 2, 2])


def test_agreement_entropy_and_second_choice_equal_a_plain_loop(planted, monkeypatch):
    labels_N, matrix = planted([40, 30, 20], 7, 0.4)
    matrix[1, ::3] = -1
    heads = encode_heads(matrix)
    labels_N = labels_N.astype(np.int32)
    counts_KC = count_consensus(labels_N, heads, 3)
    measured = measure_agreement(labels_N, heads, counts_KC, seed=0)
    aligned_C = align_heads(counts_KC, heads.offsets)
    for image, label in enumerate(labels_N):
        codes = [(head, heads.codes[head, image]) for head in range(7)]
        votes = [int(aligned_C[heads.offsets[head] + code]) for head, code in codes if code >= 0]
        shares = np.array([votes.count(cluster) for cluster in set(votes)]) / len(votes)
        assert measured.agreement_N[image] == pytest.approx(votes.count(label) / len(votes))
        assert measured.vote_entropy_N[image] == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-6)
        others = {cluster: votes.count(cluster) for cluster in votes if cluster != label}
        second = int(measured.second_choice_N[image])
        assert (others[second] == max(others.values())) if others else second == -1
    monkeypatch.setattr("icce_ray.consensus.label_matrix.PART_LABELS", 7 * 11)
    for whole, of_parts in zip(measured, measure_agreement(labels_N, heads, counts_KC, seed=0), strict=True):
        np.testing.assert_array_equal(whole, of_parts)


def test_clusters_are_described_with_what_they_are_confused_with():
    labels_N = np.array([0, 0, 0, 0, 2], dtype=np.int32)
    agreement_N = np.array([1.0, 0.5, 0.5, 1.0, 1.0], dtype=np.float32)
    second_N = np.array([-1, 2, 2, 1, -1], dtype=np.int32)
    described = describe_clusters(labels_N, agreement_N, second_N, 3)
    assert described[0] == {
        "cluster": 0,
        "size": 4,
        "mean_agreement": 0.75,
        "confused_with": [{"cluster": 2, "share": 0.5}, {"cluster": 1, "share": 0.25}],
    }
    assert described[1] == {"cluster": 1, "size": 0, "mean_agreement": None, "confused_with": []}
    assert described[2] == {"cluster": 2, "size": 1, "mean_agreement": 1.0, "confused_with": []}
