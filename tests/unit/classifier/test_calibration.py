from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from icce_ray.classifier.linear import calibrate, expected_calibration_error, fit_calibration


def test_planted_temperature_and_floor_are_found() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(10_000, 5)) * 4
    p = 0.8 * softmax(logits / 2.0, axis=1) + 0.2 / 5
    labels = (p.cumsum(1) > rng.random((len(p), 1))).argmax(1)
    temperature, floor = fit_calibration(logits, labels)
    assert temperature == pytest.approx(2.0, rel=0.05)
    assert floor == pytest.approx(0.2, abs=0.02)


def test_labels_redrawn_at_random_are_calibrated_too() -> None:
    rng = np.random.default_rng(1)
    true = rng.integers(0, 10, 4000)
    logits = rng.normal(size=(4000, 10)) + 12 * np.eye(10)[true]
    labels = np.where(rng.random(4000) < 0.3, rng.integers(0, 10, 4000), true)
    fitted, fresh = slice(0, 2000), slice(2000, 4000)
    p = calibrate(logits[fresh], *fit_calibration(logits[fitted], labels[fitted]))
    assert expected_calibration_error(p.max(1), p.argmax(1) == labels[fresh]) < 0.05


def test_probabilities_are_a_softmax_at_the_temperature_above_the_floor() -> None:
    logits = np.random.default_rng(2).normal(size=(50, 4)).astype(np.float32)
    p = calibrate(logits, 0.3, 0.1)
    assert p.dtype == np.float32
    np.testing.assert_allclose(p, 0.9 * softmax(logits / 0.3, axis=1) + 0.1 / 4, atol=1e-6)
    assert (p.argsort(1) == logits.argsort(1)).all()


def test_a_few_images_that_are_all_right_do_not_give_certainty() -> None:
    labels = np.arange(20) % 2
    p = calibrate(np.eye(2)[labels] * 5.0, *fit_calibration(np.eye(2)[labels] * 5.0, labels))
    assert 0.9 < p.max() < 0.99


def test_an_image_between_two_clusters_is_uncertain_even_if_all_held_out_images_were_right() -> None:
    labels = np.arange(60) % 2
    logits = np.eye(2)[labels] * 8.0 + np.random.default_rng(0).normal(size=(60, 2))
    fitted = fit_calibration(logits, labels)
    clear, between = calibrate(np.array([[8.0, 0.0], [0.5, 0.0]]), *fitted).max(1)
    assert clear > 0.97
    assert between < 0.8


def test_calibration_error_is_that_of_a_plain_sum_over_bins() -> None:
    probability = np.repeat([0.6, 0.9], 30)
    is_right = np.concatenate([np.arange(30) < 12, np.arange(30) < 30])
    assert expected_calibration_error(probability, is_right) == pytest.approx((0.2 + 0.1) / 2)
    assert expected_calibration_error(np.empty(0), np.empty(0, bool)) == 0.0
