from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from icce_ray.consensus.aligned_vote import rank_votes
from icce_ray.consensus.label_matrix import hash_numbers

VOTES = hnp.arrays(np.int64, st.tuples(st.integers(1, 12), st.integers(1, 7)), elements=st.integers(-1, 4))


@given(votes_nH=VOTES, seed=st.integers(0, 5), weighted=st.booleans())
@settings(max_examples=80)
def test_ranks_scores_and_entropy_equal_a_plain_count(votes_nH, seed, weighted):
    weights = np.array([1.0, 0.5, 2.0, 1.0, 1 / 3]) if weighted else None
    clusters, scores, entropies = rank_votes(votes_nH, 3, seed=seed, cluster_weights=weights)
    for row, ranked, row_scores, vote_entropy in zip(votes_nH, clusters, scores, entropies, strict=True):
        counts = Counter(int(cluster) for cluster in row if cluster >= 0)
        expected = {cluster: n * (1.0 if weights is None else weights[cluster]) for cluster, n in counts.items()}
        assert [s for s in row_scores if s > 0] == sorted(expected.values(), reverse=True)[:3]
        used = [int(cluster) for cluster in ranked if cluster >= 0]
        assert len(set(used)) == len(used) == min(3, len(expected))
        assert all(expected[cluster] == score for cluster, score in zip(used, row_scores, strict=False))
        shares = np.array(list(counts.values())) / max(sum(counts.values()), 1)
        np.testing.assert_allclose(vote_entropy, -(shares * np.log(shares)).sum(), atol=1e-12)


@given(votes_nH=VOTES, cut=st.integers(0, 12))
@example(votes_nH=np.array([[4, 4, 4], *([a, b, -1] for a in range(3) for b in range(3))]), cut=1)
def test_ties_do_not_depend_on_the_parts(votes_nH, cut):
    whole, _, _ = rank_votes(votes_nH, 2, seed=3)
    blocks = [rank_votes(block, 2, seed=3)[0] for block in (votes_nH[:cut], votes_nH[cut:]) if len(block)]
    np.testing.assert_array_equal(whole, np.concatenate(blocks))


def test_ties_go_the_same_way_for_equal_images_and_differ_between_seeds():
    votes_nH = np.tile([[0, 1, 2, 3]], (5, 1))
    winners = [rank_votes(votes_nH[:, ::step], 1, seed=seed)[0] for seed in range(20) for step in (1, -1)]
    assert all(len(np.unique(block)) == 1 for block in winners)
    for one, other in zip(winners[::2], winners[1::2], strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({int(block[0, 0]) for block in winners}) == 4


def test_without_a_seed_the_lowest_tied_cluster_wins():
    clusters, _, _ = rank_votes(np.array([[3, 1, 2], [-1, 4, 2]]), 2, seed=None)
    np.testing.assert_array_equal(clusters, [[1, 2], [2, 4]])


def test_hashes_are_evenly_spread():
    hashes = hash_numbers(np.arange(20_000), np.full(20_000, 5), seed=1)
    assert len(np.unique(hashes)) == 20_000
    shares = np.bincount((hashes >> np.uint64(61)).astype(int), minlength=8) / 20_000
    assert np.abs(shares - 1 / 8).max() < 0.01
