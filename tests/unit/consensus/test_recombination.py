"""The score on the neighbour graph, its moves and merges against plain loops; the recombination of planted heads."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from icce_ray.config import ConsensusConfig
from icce_ray.consensus import best_consensus, graph_choice, label_matrix, recombination
from icce_ray.consensus.best_consensus import find_consensus
from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.consensus.graph_choice import RECOMBINED, SPECTRAL, best_score, choose_on_graph, trusted_heads
from icce_ray.consensus.label_matrix import encode_heads
from icce_ray.consensus.neighbor_score import RESOLUTION, NeighborScore
from icce_ray.consensus.partition import PartitionError
from icce_ray.consensus.recombination import merge_cells, overlay, polish, population_size, recombine
from icce_ray.errors import InputError
from icce_ray.metrics.true_label_scores import clustering_accuracy
from icce_ray.neighbors.graph import StoredNearest
from icce_ray.store import ArtifactWriter, Folder


def random_case(seed, num_images=60):
    """Heads of 3, 2 and 5 clusters with missing labels, and neighbours of which some are missing."""
    rng = np.random.default_rng(seed)
    matrix = np.stack([rng.integers(0, size, num_images) for size in (3, 2, 5, 5)])
    matrix[1:][rng.random((3, num_images)) < 0.2] = -1
    others = np.argsort(rng.random((num_images, num_images)) + 2 * np.eye(num_images), axis=1)
    nearest_Nk = np.where(rng.random((num_images, 4)) < 0.1, -1, others[:, :4])
    return encode_heads(matrix), matrix, nearest_Nk


def plain_weights(matrix, nearest_Nk):
    """The weight of the edges between any two images, in both directions (N, N)."""
    num_images = matrix.shape[1]
    weights_NN = np.zeros((num_images, num_images))
    for i in range(num_images):
        for j in nearest_Nk[i][nearest_Nk[i] >= 0]:
            joined = sum(row[i] == row[j] != -1 for row in matrix)
            weights_NN[i, j] += joined
            weights_NN[j, i] += joined
    return weights_NN


def plain_score(weights_NN, labels_N):
    total, score = weights_NN.sum(), 0.0
    for cluster in np.unique(labels_N):
        inside = labels_N == cluster
        score += weights_NN[np.ix_(inside, inside)].sum() / total
        score -= RESOLUTION * (weights_NN[inside].sum() / total) ** 2
    return score


def plain_share(weights_NN, labels_N):
    inside_K = [labels_N == cluster for cluster in np.unique(labels_N)]
    return np.mean([weights_NN[np.ix_(inside, inside)].sum() / weights_NN[inside].sum() for inside in inside_K])


@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_that_of_a_plain_loop_whatever_the_parts(seed, monkeypatch):
    heads, matrix, nearest_Nk = random_case(seed)
    clusterings = list(np.random.default_rng(seed).integers(0, 6, (3, 60)).astype(np.int32))
    whole = NeighborScore(heads, nearest_Nk)
    scores, measured = whole.scores(clusterings, 6), whole.measure(clusterings, 6)
    weights_NN = plain_weights(matrix, nearest_Nk)
    np.testing.assert_allclose(scores, [plain_score(weights_NN, labels_N) for labels_N in clusterings], atol=1e-14)
    assert scores == [score for score, _ in measured]
    np.testing.assert_allclose(
        whole.mean_shares(clusterings, 7), [plain_share(weights_NN, labels_N) * 6 / 7 for labels_N in clusterings]
    )
    np.testing.assert_array_equal(
        whole.between(clusterings[0], 6),
        [[weights_NN[np.ix_(clusterings[0] == a, clusterings[0] == b)].sum() for b in range(6)] for a in range(6)],
    )
    monkeypatch.setattr("icce_ray.consensus.neighbor_score.PART_LABELS", 4 * 7)
    parts = NeighborScore(heads, nearest_Nk)
    assert parts.scores(clusterings, 6) == scores
    assert parts.mean_shares(clusterings, 6) == whole.mean_shares(clusterings, 6)
    for (score, moves), (part_score, part_moves) in zip(measured, parts.measure(clusterings, 6), strict=True):
        assert score == part_score
        np.testing.assert_array_equal(moves.target_N, part_moves.target_N)
        np.testing.assert_array_equal(moves.gain_N, part_moves.gain_N)
    np.testing.assert_array_equal(whole.between(clusterings[0], 6), parts.between(clusterings[0], 6))


def test_the_gain_of_a_move_is_the_change_of_the_score_where_neighbours_are_mutual():
    rng = np.random.default_rng(0)
    nearest_Nk = (np.arange(60)[:, None] + [-2, -1, 1, 2]) % 60
    matrix = rng.integers(0, 2, (5, 60))
    score = NeighborScore(encode_heads(matrix), nearest_Nk)
    weights_NN = plain_weights(matrix, nearest_Nk)
    labels_N = rng.integers(0, 4, 60).astype(np.int32)
    (start, moves), *_ = score.measure([labels_N], 4)
    for image in range(60):
        changes = {}
        for cluster in set(labels_N[nearest_Nk[image]].tolist()) - {int(labels_N[image])}:
            moved_N = labels_N.copy()
            moved_N[image] = cluster
            changes[cluster] = plain_score(weights_NN, moved_N) - start
        best = max(changes.values(), default=-np.inf)
        gain = 2 / weights_NN.sum() * moves.gain_N[image]
        assert gain == pytest.approx(best, abs=1e-12)
        if changes:
            assert changes[int(moves.target_N[image])] == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_cells_are_merged_as_by_a_plain_loop_over_all_pairs(seed):
    heads, matrix, nearest_Nk = random_case(seed)
    weights_NN = plain_weights(matrix, nearest_Nk)
    cells_N = np.random.default_rng(seed).permutation(np.arange(60) % 12).astype(np.int32)
    expected_N = cells_N.copy()
    while len(groups := np.unique(expected_N)) > 4:
        tried = [np.where(expected_N == b, a, expected_N) for a in groups for b in groups if a < b]
        expected_N = max(tried, key=lambda labels_N: plain_score(weights_NN, labels_N))
    merged_N = merge_cells(NeighborScore(heads, nearest_Nk), cells_N, 12, 4)
    assert sorted(np.unique(merged_N)) == [0, 1, 2, 3]
    assert adjusted_rand_score(expected_N, merged_N) == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_a_polish_never_lowers_the_score_nor_empties_a_cluster(seed):
    heads, matrix, nearest_Nk = random_case(seed)
    weights_NN = plain_weights(matrix, nearest_Nk)
    starts = [matrix[0].astype(np.int32), (np.arange(60) // 12).astype(np.int32)]
    polished = polish(NeighborScore(heads, nearest_Nk), starts, 5, seed=0)
    for start_N, found in zip(starts, polished, strict=True):
        assert found.score == pytest.approx(plain_score(weights_NN, found.labels_N), abs=1e-14)
        assert found.score > plain_score(weights_NN, start_N)
        assert set(np.unique(found.labels_N)) == set(np.unique(start_N))


def test_an_overlay_of_two_partial_truths_is_the_truth(planted, near):
    labels_N, matrix = planted([60, 40, 30, 20], 6, 0.1)
    score = NeighborScore(encode_heads(matrix), near(labels_N, 0.95))
    merged_low, merged_high = (np.where(labels_N == a, b, labels_N).astype(np.int32) for a, b in ((0, 1), (3, 2)))
    assert adjusted_rand_score(labels_N, overlay(score, merged_low, merged_high, 4)) == 1.0


def test_the_light_cells_of_an_overlay_join_heavy_ones(planted, near, monkeypatch):
    labels_N, matrix = planted([100, 60, 40], 4, 0.2)
    score = NeighborScore(encode_heads(matrix), near(labels_N, 0.9))
    monkeypatch.setattr(recombination, "MAX_CELLS", 1)
    found_N = overlay(score, matrix[0].astype(np.int32), matrix[1].astype(np.int32), 3)
    assert sorted(np.unique(found_N)) == [0, 1, 2]
    assert clustering_accuracy(labels_N, found_N) > 0.75


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((0.92, 0.96, 0.98), SPECTRAL),
        ((0.92, 0.96, 0.965), RECOMBINED),
        ((0.97, 0.96, 0.975), "vote"),
        ((0.97, 0.97, 0.5), "vote"),
    ],
)
def test_the_cut_is_kept_where_it_has_a_clear_lead(shares, expected):
    assert best_score(dict(zip(("vote", RECOMBINED, SPECTRAL), shares, strict=True)), "vote") == expected


@pytest.mark.parametrize(("sizes", "expected"), [([60, 60], "vote"), ([100, 20], RECOMBINED)])
def test_a_weak_graph_and_the_cut_are_asked_only_where_heads_agree_on_sizes(sizes, expected, near, monkeypatch):
    labels_N = np.repeat([0, 1], sizes).astype(np.int32)
    score = NeighborScore(encode_heads(np.stack([labels_N, labels_N, np.roll(labels_N, 4)])), near(labels_N, 0.6))
    leaving = 1 - score.shares([recombine(score, [labels_N], 2, seed=0).labels_N], 2)[0].mean()
    assert 0 < leaving < 0.2
    monkeypatch.setattr(graph_choice, "MAX_LEAVING", leaving - 0.001)
    weak = choose_on_graph(score, {"vote": labels_N}, "vote", 2, seed=0)
    assert (weak.chosen, list(weak.made), list(weak.skipped)) == (expected, [RECOMBINED], [SPECTRAL])
    monkeypatch.setattr(graph_choice, "MAX_LEAVING", leaving + 0.001)
    good = choose_on_graph(score, {"vote": labels_N}, "vote", 2, seed=0)
    assert (SPECTRAL in good.made) == (expected == RECOMBINED) == (SPECTRAL not in good.skipped)


def test_the_lowest_loss_head_decides_where_the_graph_is_weak_and_heads_disagree_on_sizes(near, monkeypatch):
    labels_N = np.repeat([0, 1], 60).astype(np.int32)
    shifted_N = np.roll(labels_N, 12)
    score = NeighborScore(encode_heads(np.stack([labels_N, labels_N, shifted_N])), near(labels_N, 0.6))
    monkeypatch.setattr(graph_choice, "MAX_LEAVING", -1.0)

    def chosen(losses: list[float] | None) -> str:
        losses_H = None if losses is None else np.array(losses)
        return choose_on_graph(score, {"vote": shifted_N}, "vote", 2, seed=0, losses_H=losses_H).chosen

    assert chosen([0.1, 0.2, 0.3]) == chosen([np.nan, 0.2, 0.3]) == RECOMBINED
    assert chosen([0.2, 0.3, 0.1]) == chosen(None) == "vote"


def test_heads_of_high_loss_are_left_out_where_heads_agree_on_sizes(near):
    labels_N = np.repeat([0, 1, 2], [100, 20, 10])
    wrong_N = np.where(np.arange(130) < 30, 1, labels_N)
    matrix, losses = np.stack([labels_N] * 3 + [wrong_N] * 3), np.array([0.1, 0.15, 0.12, 0.16, np.nan, 0.2])
    heads = encode_heads(matrix)
    assert trusted_heads(heads, losses).tolist() == [0, 1, 2]
    assert trusted_heads(heads, np.arange(6.0)).tolist() == [0, 1, 2]
    assert trusted_heads(encode_heads(matrix[:5]), np.arange(5.0)).tolist() == [0, 1, 2]
    assert trusted_heads(heads, np.full(6, 0.1)).tolist() == list(range(6))
    assert trusted_heads(encode_heads([[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]]), np.arange(3.0)).tolist() == [0, 1, 2]
    given = {"methods": ["vote"], "random_state": 0, "head_losses": losses, "neighbors": near(labels_N, 0.9)}
    found = cluster_ensemble(matrix, 3, **given)
    assert found.consensus_anmi == pytest.approx(1.0)
    assert found.agreement.min() == 0.5  # of all heads
    matrix[0, 5] = -1
    assert len(trusted_heads(encode_heads(matrix), losses)) == 6


def test_the_spectral_cut_is_that_of_scikit_learn(planted, near):
    labels_N, matrix = planted([200, 60, 30], 5, 0.3)
    nearest_Nk = near(labels_N, 0.8)
    score = NeighborScore(encode_heads(matrix), nearest_Nk)
    weights_NN = plain_weights(matrix, nearest_Nk)
    expected_N = SpectralClustering(3, affinity="precomputed", random_state=0).fit_predict(weights_NN)
    found_N = graph_choice.spectral_cut(score, 3, seed=0)
    assert adjusted_rand_score(expected_N, found_N) == 1.0
    assert adjusted_rand_score(labels_N, found_N) > 0.9


def test_unequal_groups_are_recovered_from_heads_of_which_none_is_right(planted, near):
    """A third of each head is noise, and each head merges two groups and splits a third one."""
    labels_N, matrix = planted([400, 150, 60, 30, 15], 8, 0.3, merges=True)
    nearest_Nk = near(labels_N, 0.8)
    without = cluster_ensemble(matrix, 5, methods=["vote"], random_state=0)
    found = cluster_ensemble(matrix, 5, methods=["vote"], random_state=0, neighbors=nearest_Nk)
    assert found.method == RECOMBINED
    assert found.graph_scores[found.method] == max(found.graph_scores.values())
    assert found.anmi[found.method] == found.consensus_anmi
    assert adjusted_rand_score(labels_N, found.labels) > max(0.97, adjusted_rand_score(labels_N, without.labels))
    assert (without.method, without.graph_scores) == ("vote", {})


def test_a_cut_of_too_many_images_and_clusters_is_refused(planted, near, monkeypatch):
    labels_N, matrix = planted([400, 150, 60], 3, 0.1)
    score = NeighborScore(encode_heads(matrix), near(labels_N, 0.8))
    monkeypatch.setattr(graph_choice, "MAX_WORK", 1000)
    with pytest.raises(PartitionError, match="610 images and 3 clusters: 5,490 are over the limit of 1,000"):
        graph_choice.spectral_cut(score, 3, seed=0)


def test_heads_with_other_numbers_of_clusters_take_part(planted, near):
    labels_N, matrix = planted([80, 50, 30], 6, 0.15)
    matrix[0] = matrix[0] * 2 + np.arange(160) % 2
    matrix[1] = np.minimum(matrix[1], 1)
    matrix[2, ::9] = -1
    score = NeighborScore(encode_heads(matrix), near(labels_N, 0.9))
    starts = list(recombination._starts(score, [labels_N.astype(np.int32)], 3))
    assert len(starts) == 6
    assert [len(np.unique(start_N)) for start_N in starts] == [3, 3, 2, 3, 3, 3]
    found = recombine(score, [matrix[3].astype(np.int32)], 3, seed=0)
    assert sorted(np.unique(found.labels_N)) == [0, 1, 2]
    assert clustering_accuracy(labels_N, found.labels_N) > 0.95


def test_the_recombination_does_not_depend_on_the_parts(planted, near, monkeypatch):
    monkeypatch.setattr(best_consensus, "TRIES_BUDGET", 1)
    labels_N, matrix = planted([80, 50, 40, 10], 6, 0.4)
    matrix[3:, ::7] = -1
    nearest_Nk = near(labels_N, 0.6)
    whole = cluster_ensemble(matrix, 4, methods=["mcla", "vote"], random_state=0, neighbors=nearest_Nk)
    monkeypatch.setattr(label_matrix, "PART_LABELS", 40)
    monkeypatch.setattr("icce_ray.consensus.neighbor_score.PART_LABELS", 110)
    parts = cluster_ensemble(matrix, 4, methods=["mcla", "vote"], random_state=0, neighbors=nearest_Nk)
    assert whole.summary() == parts.summary()
    for name in ("labels", "agreement", "vote_entropy", "second_choice"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_many_edges_make_a_small_population():
    assert population_size(10_000) == 10
    assert population_size(12_800_000) == 4
    assert 4 < population_size(1_000_000) < 10


def test_it_can_be_switched_off_and_is_left_out_for_noise_and_for_too_many_clusters(planted, near, monkeypatch):
    labels_N, matrix = planted([40, 30], 4, 0.2)
    heads, nearest_Nk = encode_heads(matrix), near(labels_N, 0.9)
    off = find_consensus(heads, 2, ConsensusConfig(methods=("vote",), recombine=False), seed=0, nearest=nearest_Nk)
    assert (off.method, off.graph_scores, off.skipped) == ("vote", {}, {})
    matrix[:, 5] = -1
    noisy = cluster_ensemble(matrix, 2, methods=["vote"], random_state=0, neighbors=nearest_Nk)
    assert noisy.skipped == {RECOMBINED: "no clustering has a label for 1 of the images"}
    monkeypatch.setattr(best_consensus, "MAX_CLUSTERS", 1)
    over = find_consensus(heads, 2, ConsensusConfig(methods=("vote",)), seed=0, nearest=nearest_Nk)
    assert over.method == "vote"
    assert over.skipped == {RECOMBINED: "2 clusters are over the limit of 1"}


@pytest.mark.parametrize(
    ("neighbors", "message"),
    [
        (np.zeros((5, 2)), r"float64 of shape \(5, 2\)"),
        (np.zeros((4, 2), int), r"shape \(4, 2\).*\(5, k\)"),
        (np.full((5, 2), 5), "from 5 to 5.*0 to 4"),
        (np.full((5, 2), -2), "from -2 to -2"),
    ],
)
def test_neighbours_that_are_no_images_are_refused(neighbors, message):
    with pytest.raises(InputError, match=message):
        cluster_ensemble([[0, 0, 1, 1, 1]], 2, neighbors=neighbors)


def test_stored_neighbours_are_read_by_slices_whatever_their_parts(tmp_path):
    nearest_Nk = np.arange(200, dtype=np.int32).reshape(20, 10)
    writer = ArtifactWriter(Folder.at(tmp_path))
    for number, (start, stop) in enumerate([(0, 1), (1, 13), (13, 20)]):
        writer.write_array(f"part-{number:05d}-nearest.npy", nearest_Nk[start:stop])
    stored = StoredNearest(
        writer.commit(stage="neighbors", fingerprint="f", inputs={}, config={}, metrics={}, seconds=0.0)
    )
    assert stored.shape == (20, 10)
    for start, stop in [(0, 20), (0, 1), (5, 9), (12, 14), (13, 20)]:
        np.testing.assert_array_equal(stored[start:stop], nearest_Nk[start:stop])
