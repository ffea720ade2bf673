from __future__ import annotations

import numpy as np
import pytest

from icce_ray.evaluate.estimated_accuracy import estimate_accuracy, pair_precision


def planted(distance: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, 400)
    centres = rng.normal(size=(5, 12))
    centres *= distance / np.linalg.norm(centres, axis=1, keepdims=True)
    return (centres[labels] + rng.normal(size=(400, 12))).astype(np.float32), labels


def test_pair_precision_is_the_share_of_pairs_of_runs_that_agree() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (4, 30))
    nearest = rng.integers(0, 30, (30, 5))
    agree = []
    for image in range(30):
        for other in nearest[image]:
            together = labels[:, image] == labels[:, other]
            agree += [together[a] and together[b] for a in range(4) for b in range(4) if a != b]
    assert pair_precision(labels, nearest) == pytest.approx(np.mean(agree))


def test_the_estimate_is_the_middle_of_three_views_and_follows_the_truth() -> None:
    close, far = planted(2.0), planted(8.0)
    sure = estimate_accuracy(*far, seed=0)
    unsure = estimate_accuracy(*close, seed=0)
    assert sure is not None
    assert unsure is not None
    assert sure[0] > 0.98
    assert unsure[0] < 0.8
    assert unsure[0] == sorted(unsure[1].values())[1]
    # The same features with clusters that mean nothing.
    wrong = estimate_accuracy(far[0], np.random.default_rng(1).permutation(far[1]), seed=0)
    assert wrong is not None
    assert wrong[0] < 0.4


def test_noise_and_the_numbers_of_the_clusters_do_not_matter() -> None:
    features, labels = planted(4.0)
    noisy = np.concatenate([features, 100 * np.ones((30, 12), dtype=np.float32)])
    clusters = np.concatenate([labels * 3 + 1, np.full(30, -1)])
    assert estimate_accuracy(noisy, clusters, seed=0) == estimate_accuracy(features, labels, seed=0)


def test_too_few_images_or_clusters_have_no_estimate() -> None:
    features, labels = planted(4.0)
    assert estimate_accuracy(features[:20], labels[:20], seed=0) is None
    assert estimate_accuracy(features, np.zeros(400, dtype=int), seed=0) is None
    assert estimate_accuracy(features, np.arange(400) % 100, seed=0) is None
