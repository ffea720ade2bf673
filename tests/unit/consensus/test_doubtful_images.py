"""Images that no majority of the heads places: by their features, as a plain discriminant does it."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.covariance import oas

from icce_ray.consensus import doubtful_images
from icce_ray.consensus.aligned_vote import measure_agreement
from icce_ray.consensus.doubtful_images import find_doubtful, place_doubtful
from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.consensus.label_matrix import count_consensus, encode_heads
from icce_ray.consensus.partition import PartitionError
from icce_ray.errors import InputError
from icce_ray.metrics.true_label_scores import clustering_accuracy
from icce_ray.sample.unit_features import prepare

SIZES = [200, 120, 60, 40]


@pytest.fixture(scope="module")
def groups():
    """Groups of unequal sizes that overlap and are longer in one direction: labels (N,) and features (N, 6)."""
    rng = np.random.default_rng(0)
    labels_N = rng.permutation(np.repeat(np.arange(4), SIZES)).astype(np.int32)
    centres_KD = rng.normal(size=(4, 6)) * 2
    return labels_N, (centres_KD[labels_N] + rng.normal(size=(420, 6)) * [4, 1, 1, 1, 1, 1]).astype(np.float32)


def spoil(labels_N, share=0.4, seed=1):
    """Labels of which a share is redrawn, and the images that these are."""
    rng = np.random.default_rng(seed)
    wrong = np.sort(rng.permutation(len(labels_N))[: int(share * len(labels_N))])
    spoilt_N = labels_N.copy()
    spoilt_N[wrong] = rng.integers(0, labels_N.max() + 1, len(wrong))
    return spoilt_N, wrong


def place_plainly(labels_N, doubtful_d, features_ND, num_rounds):
    """The same one image after the other, from the definitions."""
    unit_ND = prepare(features_ND, center=True)[:].astype(np.float64)
    num_clusters, inverse_DD = labels_N.max() + 1, None
    for _ in range(num_rounds):
        means_KD = np.array([unit_ND[labels_N == k].mean(axis=0) for k in range(num_clusters)])
        if inverse_DD is None:
            residuals_ND = np.array([row - means_KD[k] for row, k in zip(unit_ND, labels_N, strict=True)])
            inverse_DD = np.linalg.inv(oas(residuals_ND, assume_centered=True)[0])
        placed_N = labels_N.copy()
        for image in doubtful_d:
            density_K = [
                np.log((labels_N == k).mean()) - (unit_ND[image] - mean) @ inverse_DD @ (unit_ND[image] - mean) / 2
                for k, mean in enumerate(means_KD)
            ]
            placed_N[image] = np.argmax(density_K)
        labels_N = placed_N
    return labels_N


def place(labels_N, doubtful_d, features_ND, num_clusters=4):
    heads, unit = encode_heads(labels_N[None]), prepare(features_ND, center=True)
    return place_doubtful(labels_N, doubtful_d, heads, lambda: unit, num_clusters)


def test_doubtful_images_are_those_that_at_most_half_of_the_heads_place_if_they_are_half_of_all():
    agreement_N = np.array([0.2, 0.5, 0.51, 1.0], np.float32)
    assert find_doubtful(agreement_N).tolist() == [0, 1]
    assert find_doubtful(np.append(agreement_N, np.float32(1.0))).tolist() == []


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_they_get_the_cluster_of_the_highest_density(groups, monkeypatch, num_rounds):
    monkeypatch.setattr(doubtful_images, "NUM_ROUNDS", num_rounds)
    spoilt_N, wrong = spoil(groups[0])
    placed_N = place(spoilt_N, wrong, groups[1])
    np.testing.assert_array_equal(placed_N, place_plainly(spoilt_N, wrong, groups[1], num_rounds))
    assert (placed_N != place_plainly(spoilt_N, wrong, groups[1], num_rounds - 1)).any()


def test_most_are_right_then_and_the_others_stay(groups):
    labels_N, features_ND = groups
    spoilt_N, wrong = spoil(labels_N)
    placed_N = place(spoilt_N, wrong, features_ND)
    assert (placed_N == labels_N)[wrong].mean() > 0.85 > 0.5 > (spoilt_N == labels_N)[wrong].mean()
    certain = np.setdiff1d(np.arange(420), wrong)
    np.testing.assert_array_equal(placed_N[certain], spoilt_N[certain])


def test_the_parts_change_nothing(groups, monkeypatch):
    spoilt_N, wrong = spoil(groups[0])
    whole_N = place(spoilt_N, wrong, groups[1])
    monkeypatch.setattr(doubtful_images, "PART_ELEMENTS", 100)
    np.testing.assert_array_equal(place(spoilt_N, wrong, groups[1]), whole_N)


def test_the_covariance_is_that_of_a_sample_of_many_images(groups, monkeypatch):
    spoilt_N, wrong = spoil(groups[0])
    whole_N = place(spoilt_N, wrong, groups[1])
    for limit, value in (("MAX_SAMPLE", 60), ("MAX_SAMPLE_ELEMENTS", 360)):
        with monkeypatch.context() as patch:
            patch.setattr(doubtful_images, limit, value)
            sampled_N = place(spoilt_N, wrong, groups[1])
        assert 0 < (sampled_N != whole_N).sum() < 40


def test_no_cluster_is_emptied_and_an_empty_one_stays_empty(groups):
    labels_N, features_ND = groups
    alone_N = labels_N.copy()
    alone_N[:1] = 5  # its feature fits another cluster; 4 has no image
    placed_N = place(alone_N, np.arange(100), features_ND, num_clusters=6)
    assert placed_N[0] == 5
    assert set(placed_N) == {0, 1, 2, 3, 5}


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_DIMS", 5, "6 dimensions are over the limit of 5"),
        ("MAX_TABLE", 23, "24 numbers in the clusters' means are over the limit of 23"),
        ("MAX_WORK", 420 * 36 + 168 * 24 - 1, "19,152 multiplications are over the limit of 19,151"),
    ],
)
def test_what_would_take_too_long_is_left_out_and_said(groups, monkeypatch, limit, value, message):
    spoilt_N, wrong = spoil(groups[0])
    monkeypatch.setattr(doubtful_images, limit, value)
    with pytest.raises(PartitionError, match=message):
        place(spoilt_N, wrong, groups[1])
    monkeypatch.setattr(doubtful_images, limit, value + 1)
    place(spoilt_N, wrong, groups[1])


def test_features_that_do_not_differ_place_nothing(groups):
    with pytest.raises(PartitionError, match="don't differ"):
        place(groups[0], np.arange(9), np.ones((420, 6), np.float32))


@pytest.mark.parametrize("noise", [0.75, 0.55])
def test_the_consensus_of_uncertain_heads_is_better_with_the_features(groups, planted, noise):
    labels_N, features_ND = groups
    rng = np.random.default_rng(2)
    matrix = np.array([np.where(rng.random(420) < noise, rng.integers(0, 4, 420), labels_N) for _ in range(5)])
    plain, placed = (cluster_ensemble(matrix, 4, random_state=0, features=some) for some in (None, features_ND))
    moved = placed.labels != plain.labels
    assert placed.num_relabelled == moved.sum() == placed.summary()["num_relabelled"]
    assert plain.num_relabelled == 0
    if noise == 0.55:  # fewer than half are doubtful
        assert not moved.any()
        return
    assert moved.sum() > 10
    gain = clustering_accuracy(labels_N, placed.labels) - clustering_accuracy(labels_N, plain.labels)
    assert gain > 0.5 * moved.mean()
    assert (plain.agreement[moved] <= 0.5).all()
    heads = encode_heads(matrix)
    again = measure_agreement(placed.labels, heads, count_consensus(placed.labels, heads, 4), seed=0)
    np.testing.assert_array_equal(placed.agreement, again.agreement_N)
    assert placed.consensus_anmi < plain.consensus_anmi


def test_images_without_a_label_leave_it_out(groups):
    matrix = np.stack([spoil(groups[0], 0.95, seed)[0] for seed in range(3)])
    matrix[:, 7] = -1
    found = cluster_ensemble(matrix, 4, random_state=0, features=groups[1])
    assert found.skipped["relabelled"] == "no clustering has a label for 1 of the images"
    assert found.labels[7] == -1


@pytest.mark.parametrize(
    "features", [np.zeros((419, 6)), np.zeros(420), np.full((420, 2), "a"), np.full((420, 2), np.nan)]
)
def test_features_that_do_not_fit_are_refused(groups, features):
    with pytest.raises(InputError, match="feature"):
        cluster_ensemble(groups[0][None].repeat(2, axis=0), 4, features=features)
