from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score

from icce_ray.consensus import best_consensus, graph_cuts, partition
from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.errors import InputError
from icce_ray.metrics.true_label_scores import clustering_accuracy, contingency_table, match_to_classes


def mean_nmi(labels_N, matrix):
    rows = [(labels_N[row >= 0], row[row >= 0]) for row in np.asarray(matrix)]
    return np.mean([normalized_mutual_info_score(a, b, average_method="geometric") for a, b in rows])


@pytest.fixture(scope="module")
def noisy(planted):
    return planted([60, 60, 60, 60], 9, 0.35)


def test_planted_clusters_are_recovered_and_the_best_method_is_kept(noisy):
    labels_N, matrix = noisy
    result = cluster_ensemble(matrix, 4, random_state=0)
    assert clustering_accuracy(labels_N, result.labels) > 0.99
    assert set(result.anmi) == {"mcla", "hbgf", "cspa", "vote"}
    assert not result.skipped
    assert result.anmi[result.method] == max(result.anmi.values()) == result.consensus_anmi
    assert all(result.anmi[method] >= result.start_anmi[method] for method in result.anmi)
    assert result.consensus_anmi == pytest.approx(mean_nmi(result.labels, matrix), abs=1e-12)
    assert (result.labels.dtype, result.agreement.dtype, result.vote_entropy.dtype, result.second_choice.dtype) == (
        np.int32,
        np.float32,
        np.float32,
        np.int32,
    )


@pytest.mark.parametrize("merges", [False, True])
def test_unbalanced_clusters_are_recovered_at_least_as_well_as_by_the_best_head(planted, merges):
    sizes = np.maximum(1000 / np.arange(1, 11) ** 2, 10).astype(int).tolist()
    labels_N, matrix = planted(sizes, 16, 0.3, seed=2, merges=merges)
    result = cluster_ensemble(matrix, 10, methods=["mcla", "vote"], random_state=0)
    accuracy = clustering_accuracy(labels_N, result.labels)
    assert accuracy >= max(clustering_accuracy(labels_N, row) for row in matrix)
    assert accuracy > 0.95


def test_clusters_of_one_to_a_hundred_images_are_recovered_at_least_as_well_as_by_the_best_head(planted):
    sizes = np.maximum(100 / np.arange(1, 21) ** 1.5, 1).astype(int).tolist()
    assert (max(sizes), min(sizes)) == (100, 1)
    labels_N, matrix = planted(sizes, 16, 0.3)
    result = cluster_ensemble(matrix, len(sizes), random_state=0)
    assert clustering_accuracy(labels_N, result.labels) >= max(clustering_accuracy(labels_N, row) for row in matrix)


def test_the_same_seed_gives_the_same_result_and_random_states_are_accepted(noisy):
    _, matrix = noisy
    one, other = (cluster_ensemble(matrix, 4, random_state=7, methods=["mcla"]) for _ in range(2))
    for name in ("labels", "agreement", "vote_entropy", "second_choice"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.anmi == other.anmi
    generators = [np.random.RandomState(5), np.random.RandomState(5)]
    drawn = [cluster_ensemble(matrix, 4, random_state=generator, methods="vote").labels for generator in generators]
    np.testing.assert_array_equal(*drawn)
    assert len(cluster_ensemble(matrix, 4, random_state=None, methods="vote").labels) == 240


def test_without_a_number_of_clusters_it_is_that_of_the_head_with_the_most():
    result = cluster_ensemble([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2]], methods="vote", random_state=0)
    assert sorted(np.unique(result.labels)) == [0, 1, 2]


def test_a_single_head_is_its_own_consensus(planted):
    _, matrix = planted([20, 30, 10], 1, 0.0)
    result = cluster_ensemble(matrix, 3, methods="vote", random_state=0)
    assert result.consensus_anmi == pytest.approx(1.0)
    assert result.agreement.min() == 1.0
    assert result.vote_entropy.max() == 0.0
    assert set(result.second_choice) == {-1}


def test_identical_heads_give_that_head_even_for_more_clusters_than_they_have(planted):
    labels_N, _ = planted([20, 30, 10], 1, 0.0)
    matrix = np.tile(labels_N, (4, 1))
    for num_clusters in (3, 20):
        result = cluster_ensemble(matrix, num_clusters, random_state=0)
        assert result.consensus_anmi == pytest.approx(1.0)
        assert clustering_accuracy(labels_N, result.labels) == 1.0
        assert result.labels.max() < num_clusters
    assert set(result.skipped) == {"hbgf", "cspa"}


@pytest.mark.parametrize("num_clusters", [2, 12])
def test_any_number_of_clusters_is_reached_from_heads_that_disagree(planted, num_clusters):
    _, matrix = planted([40, 40, 40, 40], 6, 0.3)
    matrix[1] = np.minimum(matrix[1], 1)
    result = cluster_ensemble(matrix, num_clusters, methods=["mcla", "hbgf"], random_state=0)
    np.testing.assert_array_equal(np.unique(result.labels), np.arange(num_clusters))


def test_missing_labels_gaps_in_numbers_and_any_integer_type_are_understood(noisy):
    labels_N, matrix = noisy
    matrix = np.where(np.random.default_rng(0).random(matrix.shape) < 0.2, -1, matrix * 1000 + 17).astype(np.int16)
    matrix[0] = np.where(matrix[0] < 0, 17, matrix[0])
    result = cluster_ensemble(matrix, 4, methods=["mcla", "vote"], random_state=0)
    assert clustering_accuracy(labels_N, result.labels) > 0.97
    assert result.consensus_anmi == pytest.approx(mean_nmi(result.labels, matrix), abs=1e-12)
    agrees_HN = np.full(matrix.shape, np.nan)
    for row, agrees_N in zip(matrix, agrees_HN, strict=True):
        codes_n = np.unique(row[row >= 0], return_inverse=True)[1]
        matched = match_to_classes(contingency_table(result.labels[row >= 0], codes_n))
        agrees_N[row >= 0] = matched[codes_n] == result.labels[row >= 0]
    np.testing.assert_allclose(result.agreement, np.nanmean(agrees_HN, axis=0), atol=1e-6)


def test_a_partitioner_that_refuses_does_not_take_the_others_along(noisy, monkeypatch):
    labels_N, matrix = noisy
    monkeypatch.setattr(partition, "COMMAND", [sys.executable, "-c", "import sys; sys.exit('METIS: no such graph')"])
    result = cluster_ensemble(matrix, 4, random_state=0)
    assert set(result.skipped) == {"mcla", "hbgf", "cspa"}
    assert "METIS: no such graph" in result.skipped["mcla"]
    assert result.method == "vote"
    fallback = cluster_ensemble(matrix, 4, methods=["mcla"], random_state=0)
    assert fallback.method == "vote"
    assert clustering_accuracy(labels_N, fallback.labels) > 0.99


def test_the_best_head_alone_is_returned_as_it_is(noisy):
    _, matrix = noisy
    losses = np.linspace(1, 2, len(matrix))
    losses[3] = 0.5
    result = cluster_ensemble(matrix, 4, methods=["best_head"], refine=False, head_losses=losses)
    np.testing.assert_array_equal(result.labels, matrix[3])
    assert result.method == "best_head"


def test_without_refinement_nothing_moves(noisy):
    result = cluster_ensemble(noisy[1], 4, methods="mcla", refine=False, random_state=0)
    assert result.anmi == result.start_anmi
    assert result.start_anmi == cluster_ensemble(noisy[1], 4, methods="mcla", random_state=0).start_anmi


def test_functions_that_would_cost_too_much_are_left_out_with_the_count(noisy, monkeypatch):
    monkeypatch.setattr(graph_cuts, "HBGF_MAX_EDGES", 2000)
    monkeypatch.setattr(graph_cuts, "MCLA_MAX_EDGES", 10)
    monkeypatch.setattr(graph_cuts, "CSPA_MAX_IMAGES", 239)
    result = cluster_ensemble(noisy[1], 4, methods=["mcla", "hbgf", "cspa", "vote"], random_state=0)
    assert set(result.skipped) == {"mcla", "hbgf", "cspa"}
    assert set(result.anmi) == {"vote"}
    assert "240 images are over the limit of 239" in result.skipped["cspa"]
    assert "2,160 edges, over the limit of 2,000" in result.skipped["hbgf"]
    assert "over the limit of 10" in result.skipped["mcla"]


def test_clusters_that_a_partitioner_left_empty_are_filled_and_counted(noisy, monkeypatch):
    collapsed = np.zeros(240, dtype=np.int32)
    monkeypatch.setattr(best_consensus, "mcla", lambda *a, **k: [collapsed])
    result = cluster_ensemble(noisy[1], 4, methods=["mcla"], random_state=0)
    assert result.repaired == result.summary()["repaired"] == {"mcla": 3}
    assert len(np.unique(result.labels)) == 4


def test_large_inputs_get_one_try(noisy, monkeypatch):
    seeds_seen = []
    labels = noisy[1][0]
    monkeypatch.setattr(best_consensus, "mcla", lambda *a, seeds, **k: seeds_seen.append(len(seeds)) or [labels])
    cluster_ensemble(noisy[1], 4, methods="mcla", random_state=0)
    monkeypatch.setattr(best_consensus, "TRIES_BUDGET", 100)
    cluster_ensemble(noisy[1], 4, methods="mcla", random_state=0)
    assert seeds_seen == [best_consensus.MAX_SEEDS, 1]


def test_the_summary_is_json_and_counts_the_clusters():
    result = cluster_ensemble([[0, 0, 0, 1, 1, 2]], 3, methods="vote", random_state=0)
    summary = json.loads(json.dumps(result.summary()))
    assert (summary["smallest_cluster"], summary["median_cluster"], summary["largest_cluster"]) == (1, 2.0, 3)
    assert (summary["num_clusters"], summary["anmi"], summary["mean_agreement"]) == (3, pytest.approx(1.0), 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_clusters": 0}, "n_clusters is 0"),
        ({"n_clusters": 7}, "n_clusters is 7.*6"),
        ({"n_clusters": 2.5}, r"n_clusters is 2\.5"),
        ({"methods": ["kmeans"]}, "methods.*kmeans.*mcla.*hbgf.*cspa.*vote.*best_head"),
        ({"methods": []}, "methods is empty"),
        ({"imbalance": 0.5}, r"imbalance.*0\.5"),
        ({"imbalance": float("nan")}, "imbalance.*nan"),
        ({"head_losses": [1.0]}, r"head_losses has shape \(1,\)"),
        ({"random_state": "x"}, "'x' cannot be used to seed"),
        ({"random_state": -1}, "non-negative"),
    ],
)
def test_parameters_out_of_range_are_refused_with_the_value_and_the_bound(arguments, message):
    with pytest.raises(ValueError, match=message):
        cluster_ensemble([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1]], **arguments)


def test_heads_that_say_nothing_are_refused_unless_a_number_of_clusters_is_given():
    with pytest.raises(InputError, match="single cluster"):
        cluster_ensemble([[0, 0, 0], [0, 0, 0]])
    assert cluster_ensemble([[0, 0, 0], [0, 0, 0]], 2, methods="vote", random_state=0).labels.tolist() == [0, 0, 0]


def real_features(name, real_data_dir):
    if name == "digits":
        digits = load_digits()
        return digits.data.astype(np.float32), digits.target
    features_ND = np.load(real_data_dir / "cifar10_test_mixpca256.npy")[:4000, :64].astype(np.float32)
    return features_ND, np.load(real_data_dir / "cifar10_test_labels.npy")[:4000].astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "cifar10"])  # Fashion-MNIST's two classes: 98% right, no ten points left
def test_agreement_tells_accurate_images_of_real_features_from_others(name, real_data_dir):
    features_ND, labels_N = real_features(name, real_data_dir)
    features_ND = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
    matrix = np.array(
        [MiniBatchKMeans(10, random_state=s, n_init=1, max_iter=10).fit_predict(features_ND) for s in range(12)]
    )
    result = cluster_ensemble(matrix, 10, methods=["mcla", "vote"], random_state=0)
    assert result.consensus_anmi > max(mean_nmi(row, matrix) for row in matrix) - 1 / len(matrix)
    class_of_cluster = match_to_classes(contingency_table(labels_N, result.labels))
    is_right = class_of_cluster[result.labels] == labels_N
    order = np.argsort(result.agreement, kind="stable")
    half = len(order) // 2
    assert is_right[order[half:]].mean() >= is_right[order[:half]].mean() + 0.10


def test_noise_that_no_head_labels_stays_noise_and_changes_nothing_for_the_others(noisy):
    _, matrix = noisy
    noise = np.array([0, 7, 8, 100, 239])
    with_noise = matrix.copy()
    with_noise[:, noise] = -1
    methods = ["hbgf", "vote"]  # one reads the whole matrix, the other its parts
    result = cluster_ensemble(with_noise, 4, methods=methods, random_state=0)
    rest = cluster_ensemble(np.delete(matrix, noise, axis=1), 4, methods=methods, random_state=0)
    for name, fill in (("labels", -1), ("agreement", np.nan), ("vote_entropy", 0.0), ("second_choice", -1)):
        values = getattr(result, name)
        assert values.dtype == getattr(rest, name).dtype
        np.testing.assert_array_equal(values[noise], fill)
        np.testing.assert_array_equal(np.delete(values, noise), getattr(rest, name))
    assert result.summary() == rest.summary() | {"num_noise": 5}


def test_a_single_clustering_is_its_own_consensus_noise_included():
    row = np.array([3, 0, -1, 2, 2, 1, -1, 0], dtype=np.int32)
    result = cluster_ensemble(row[None], random_state=0)
    np.testing.assert_array_equal(result.labels, row)
    np.testing.assert_array_equal(result.agreement, np.where(row >= 0, 1.0, np.nan))
    assert (result.method, result.consensus_anmi) == ("best_head", 1.0)
    assert len(np.unique(cluster_ensemble(row[None], 3, random_state=0).labels)) == 4, "three clusters, and noise"
