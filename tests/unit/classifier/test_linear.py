from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.datasets import load_digits

from icce_ray.classifier.linear import NOISE, UNKNOWN, LinearClassifier, expected_calibration_error
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import ClassifierConfig
from icce_ray.errors import InputError

CONFIG = ClassifierConfig(num_iterations=400)


def fit(x: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], **changes: object) -> LinearClassifier:
    settings = {"num_clusters": int(labels.max()) + 1, "seed": 0, "outlier_quantile": 0.999} | changes
    return fit_classifier(x, labels, CONFIG, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def digits() -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int64]]:
    data = load_digits()
    return (data.data / 16).astype(np.float16), data.target.astype(np.int64)


@pytest.fixture(scope="module")
def classifier(digits: tuple[npt.NDArray[np.float16], npt.NDArray[np.int64]]) -> LinearClassifier:
    return fit(digits[0][:1400], digits[1][:1400])


def test_noisy_labels_are_corrected(digits: tuple[npt.NDArray[np.float16], npt.NDArray[np.int64]]) -> None:
    x, true = digits
    rng = np.random.default_rng(0)
    noisy = np.where(rng.random(len(true)) < 0.2, rng.integers(0, 10, len(true)), true)
    predicted = fit(x, noisy).predict(x)
    assert (noisy == true).mean() < 0.84
    assert (predicted == true).mean() > 0.93


def test_fresh_images_are_labelled_with_calibrated_probabilities(
    classifier: LinearClassifier, digits: tuple[npt.NDArray[np.float16], npt.NDArray[np.int64]]
) -> None:
    x, labels = digits[0][1400:], digits[1][1400:]
    p = classifier.predict_proba(x)
    assert p.shape == (397, 10)
    assert p.dtype == np.float32
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert (p.argmax(1) == classifier.predict(x)).all()
    assert (p.argmax(1) == labels).mean() > 0.87
    assert classifier.ece < 0.05
    assert expected_calibration_error(p.max(1), p.argmax(1) == labels) < 0.08


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    x = np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)
    labels = (x[:, 0] > 0).astype(np.int64)
    assert fit(x, labels).to_bytes() == fit(x, labels).to_bytes()
    assert fit(x, labels).to_bytes() != fit(x, labels, seed=1).to_bytes()


def test_the_number_of_threads_changes_no_prediction(
    digits: tuple[npt.NDArray[np.float16], npt.NDArray[np.int64]],
) -> None:
    x, labels = digits[0][:500], digits[1][:500]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fit(x, labels)
        torch.set_num_threads(2)
        two = fit(x, labels)
    finally:
        torch.set_num_threads(before)
    assert (one.predict(x) == two.predict(x)).all()
    np.testing.assert_allclose(one.weights, two.weights, atol=1e-4)


def test_bytes_hold_the_whole_classifier(
    classifier: LinearClassifier, digits: tuple[npt.NDArray[np.float16], npt.NDArray[np.int64]]
) -> None:
    restored = LinearClassifier.from_bytes(classifier.to_bytes())
    for field in dataclasses.fields(LinearClassifier):
        if field.name != "outliers":
            np.testing.assert_array_equal(getattr(restored, field.name), getattr(classifier, field.name))
    x = digits[0][1400:]
    np.testing.assert_array_equal(restored.predict_proba(x), classifier.predict_proba(x))
    np.testing.assert_array_equal(restored.label(x).outlier_score, classifier.label(x).outlier_score)
    assert b"pickle" not in classifier.to_bytes()
    other = re.sub(rb"(format_version[^0-9]+)[0-9]", rb"\g<1>9", classifier.to_bytes())
    with pytest.raises(InputError, match="has format 9; this version reads format"):
        LinearClassifier.from_bytes(other)


@pytest.mark.parametrize("data", [b"", b"nonsense" * 9, b"\x80\x04N."])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="not a classifier file"):
        LinearClassifier.from_bytes(data)


def test_scale_and_offset_of_the_features_do_not_matter() -> None:
    x = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    labels = (x[:, 0] > 0).astype(np.int64)
    moved = x * 500 + 3000
    assert (fit(x, labels).predict(x) == fit(moved, labels).predict(moved)).all()


def test_rows_without_a_consensus_label_are_left_out() -> None:
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    labels = (x[:, 0] > 0).astype(np.int64)
    foreign = np.full((50, 4), 1e4, dtype=np.float32)
    joined = fit(np.concatenate([foreign, x]), np.concatenate([np.full(50, -1), labels]))
    assert joined.to_bytes() == fit(x, labels).to_bytes()


def test_empty_clusters_are_never_predicted() -> None:
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    labels = np.where(x[:, 0] > 0, 3, 1)
    classifier = fit(x, labels, num_clusters=5)
    assert set(classifier.predict(x)) == {1, 3}
    assert classifier.cluster_sizes.tolist() == [0, (labels == 1).sum(), 0, (labels == 3).sum(), 0]
    assert np.isfinite(classifier.label(x).outlier_score).all()


def test_one_pass_says_what_the_plain_probabilities_say(
    classifier: LinearClassifier, digits: tuple[npt.NDArray[np.float16], npt.NDArray[np.int64]]
) -> None:
    x = digits[0]
    p = classifier.predict_proba(x)
    found = classifier.label(x)
    assert (found.cluster == p.argmax(1)).all()
    np.testing.assert_allclose(found.consensus_probability, p.max(1), atol=1e-6)
    assert (found.second_choice == np.argsort(-p, axis=1, kind="stable")[:, 1]).mean() > 0.999
    given = np.where(np.arange(len(x)) % 3 == 0, (found.cluster + 4) % 10, UNKNOWN)
    kept = classifier.label(x, given)
    assert (kept.cluster == np.where(given >= 0, given, found.cluster)).all()
    np.testing.assert_allclose(kept.consensus_probability, p[np.arange(len(x)), kept.cluster], atol=1e-6)
    assert (kept.second_choice[given >= 0] == found.cluster[given >= 0]).all()
    noise = classifier.label(x[:9], np.full(9, NOISE))
    assert (noise.cluster == NOISE).all()
    assert (noise.second_choice == found.cluster[:9]).all()
    assert (noise.consensus_probability == 0).all()
    np.testing.assert_array_equal(kept.outlier_score, found.outlier_score)
    np.testing.assert_array_equal(found.is_outlier, found.outlier_score > classifier.outlier_threshold)


def test_far_images_are_outliers_and_the_training_images_are_not(
    classifier: LinearClassifier, digits: tuple[npt.NDArray[np.float16], npt.NDArray[np.int64]]
) -> None:
    assert classifier.label(digits[0][:1400]).is_outlier.mean() < 0.005
    assert classifier.label(np.random.default_rng(0).random((100, 64))).is_outlier.mean() > 0.95


def test_features_of_another_width_are_refused(classifier: LinearClassifier) -> None:
    with pytest.raises(InputError, match=r"\(3, 65\).*\(n, 64\)"):
        classifier.predict(np.zeros((3, 65)))


def test_impossible_input_is_refused() -> None:
    x = np.zeros((4, 2), dtype=np.float32)
    with pytest.raises(InputError, match="at least 2 labelled images"):
        fit(x, np.array([0, -1, -1, -1]))
    with pytest.raises(InputError, match="there is a label 2, but only 2 clusters"):
        fit(x, np.array([0, 1, 2, 0]), num_clusters=2)
    with pytest.raises(InputError, match="do not fit 3 labels"):
        fit(x, np.array([0, 1, 1]))


def test_a_grid_that_diverges_altogether_says_so() -> None:
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    config = ClassifierConfig(num_iterations=300, learning_rates=(1.5e39,))
    with pytest.raises(InputError, match=r"classifier\.learning_rates"):
        fit_classifier(x, np.arange(50) % 2, config, num_clusters=2, seed=0, outlier_quantile=0.9)


@pytest.mark.parametrize("num_images", [2, 3, 10])
def test_a_handful_of_equal_images_works(num_images: int) -> None:
    classifier = fit(np.ones((num_images, 3)), np.arange(num_images) % 2)
    assert np.isfinite(classifier.predict_proba(np.zeros((2, 3)))).all()
    assert np.isfinite(classifier.label(np.zeros((2, 3))).outlier_score).all()


@pytest.mark.slow
def test_real_features_give_calibrated_probabilities(real_data_dir: Path) -> None:
    x = np.load(real_data_dir / "cifar10_test_mixpca256.npy")
    labels = np.load(real_data_dir / "cifar10_test_labels.npy").astype(np.int64)
    order = np.random.default_rng(0).permutation(len(x))  # the files are sorted by class
    x, labels = x[order], labels[order]
    classifier = fit_classifier(
        x[:8000], labels[:8000], ClassifierConfig(), num_clusters=10, seed=0, outlier_quantile=0.999
    )
    p = classifier.predict_proba(x[8000:])
    assert expected_calibration_error(p.max(1), p.argmax(1) == labels[8000:]) < 0.05


def test_one_image_with_enormous_features_does_not_spoil_the_others() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    x = (rng.normal(size=(300, 6)) + 6 * np.eye(6)[labels]).astype(np.float32)
    x[5] += 20_000
    classifier = fit(x, labels)
    others = np.arange(300) != 5
    assert (classifier.predict(x[others]) == labels[others]).mean() > 0.97
    assert classifier.predict_proba(x[others]).max(1).mean() > 0.9
