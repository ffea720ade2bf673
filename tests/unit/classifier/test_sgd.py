from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from icce_ray.classifier.sgd import Grid, batches, train_grid

SETTINGS = {"num_clusters": 3, "num_dims": 5, "momentum": 0.9, "batch_size": 16, "num_steps": 300, "seed": 7}


def blobs(num_images: int = 90) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, num_images)
    return (rng.normal(size=(3, 5)) * 2)[labels].astype(np.float32) + rng.normal(size=(num_images, 5)).astype(
        np.float32
    ), labels


def train(x: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], *rates: float) -> Grid:
    return train_grid(lambda rows: x[rows], labels, learning_rates=rates, **SETTINGS)  # type: ignore[arg-type]


def reference(x: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], rate: float) -> npt.NDArray[np.float64]:
    """One classifier, one step at a time, in float64: weights (D + 1, K), the bias in the last row."""
    weights, velocity = np.zeros((6, 3)), np.zeros((6, 3))
    for step, rows in enumerate(batches(len(x), 16, 300, 7)):
        inputs = np.hstack([x[rows].astype(np.float64), np.ones((16, 1))])
        logits = inputs @ weights
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(16), labels[rows]] -= 1
        velocity = 0.9 * velocity + inputs.T @ p / 16
        weights -= rate * 16 / 256 * (1 + math.cos(math.pi * step / 300)) / 2 * velocity
    return weights


def test_each_setting_of_the_grid_equals_a_plain_loop_that_trains_it_alone() -> None:
    x, labels = blobs()
    rates = (0.01, 0.1, 1.0)
    grid = train(x, labels, *rates)
    for setting, rate in enumerate(rates):
        expected = reference(x, labels, rate)
        np.testing.assert_allclose(grid.weights[setting], expected[:-1], atol=1e-5)
        np.testing.assert_allclose(grid.biases[setting], expected[-1], atol=1e-5)


def test_a_setting_that_diverges_is_dropped_and_leaves_the_others_alone() -> None:
    x, labels = blobs()
    grid = train(x * 1e3, labels, 1e36, 1e-4)
    assert grid.positions == [1]
    np.testing.assert_allclose(grid.weights, train(x * 1e3, labels, 1e-4).weights, rtol=1e-4, atol=1e-5)


def test_when_all_diverge_nothing_is_left() -> None:
    x, labels = blobs()
    assert train(x * 1e3, labels, 1e36, 1e37).positions == []


def test_batches_go_through_all_images_before_any_comes_again() -> None:
    rows = np.concatenate(list(batches(10, 4, 5, seed=1)))
    assert len(rows) == 20
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert list(rows[:10]) != list(rows[10:])
