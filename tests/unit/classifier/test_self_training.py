from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import load_digits
from sklearn.preprocessing import normalize

from icce_ray import cluster_ensemble
from icce_ray.classifier.linear import expected_calibration_error
from icce_ray.classifier.self_training import Candidate, SelfTraining, fit_classifier, num_steps
from icce_ray.config import ClassifierConfig

MAX_CALIBRATION_ERROR = 0.05
MAX_ACCURACY_LOSS = 0.005


def blobs() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    return (rng.normal(size=(300, 6)) + 2 * np.eye(6)[labels]).astype(np.float32), labels


def training(features: npt.NDArray[np.float32] | None = None, **changes: object) -> SelfTraining:
    config = ClassifierConfig.model_validate({"num_iterations": 200} | changes)
    x, labels = blobs()
    return SelfTraining(
        x if features is None else features, labels, config, num_clusters=3, seed=0, outlier_quantile=0.99
    )


@pytest.mark.parametrize("num_processes", [2, 13])
def test_processes_that_divide_the_grid_make_the_classifier_of_one(num_processes: int) -> None:
    problem = training()
    alone = problem.finish([problem.train(range(13))])
    shares = [problem.train(range(rank, 13, num_processes)) for rank in range(num_processes)]
    together = problem.finish(shares)
    assert together.learning_rate == alone.learning_rate
    np.testing.assert_allclose(together.weights, alone.weights, atol=1e-5)
    assert together.temperature == pytest.approx(alone.temperature, rel=1e-3)
    assert together.holdout_agreement == alone.holdout_agreement


def test_learning_rates_that_diverge_are_dropped_in_every_process() -> None:
    problem = training(learning_rates=[5e38, 0.01, 6e38, 0.05])
    candidates = [problem.train([0, 2]), problem.train([1, 3])]
    assert candidates[0].position == -1
    classifier = problem.finish(candidates)
    assert classifier.num_diverged == 2
    sound = training(learning_rates=[0.01, 0.05])
    assert classifier.learning_rate == sound.finish([sound.train([0, 1])]).learning_rate


def test_the_candidate_that_agrees_best_with_the_consensus_is_chosen() -> None:
    problem = training()
    weights, bias = np.eye(6, 3, dtype=np.float32), np.zeros(3, dtype=np.float32)
    ranked = [(1, 0.9, 0.4), (3, 0.9, 0.4), (0, 0.9, 0.5), (2, 0.8, 0.1)]  # position, agreement, loss
    candidates = [Candidate(position, agreement, loss, weights, bias, 0) for position, agreement, loss in ranked]
    rates = problem.config.learning_rates
    for first in range(len(ranked)):
        assert problem.finish(candidates[first:][::-1]).learning_rate == rates[ranked[first][0]]


def test_held_out_images_are_a_tenth_and_are_not_trained_on() -> None:
    whole = training()
    assert len(whole.holdout_rows) == 30
    assert sorted([*whole.holdout_rows, *whole.train_rows]) == list(range(300))
    changed = blobs()[0]
    changed[whole.holdout_rows] += 7
    candidate, same = whole.train([12]), training(changed).train([12])
    np.testing.assert_array_equal(same.weights, candidate.weights)
    assert same.loss != candidate.loss


@pytest.mark.parametrize(
    ("num_images", "steps"), [(5, 1_000), (1_000, 1_000), (5_000, 3_907), (16_001, 12_500), (1_281_167, 12_500)]
)
def test_the_number_of_steps_is_a_hundred_passes_within_bounds(num_images: int, steps: int) -> None:
    assert num_steps(ClassifierConfig(), num_images) == steps
    assert num_steps(ClassifierConfig(num_iterations=70), num_images) == 70


def real(folder: Path, name: str) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int64]]:
    if name == "digits":
        digits = load_digits()
        return (digits.data / 16).astype(np.float16), digits.target.astype(np.int64)
    labels = "fmnist_2000_labels" if name.startswith("fmnist") else "cifar10_test_labels"
    return np.load(folder / f"{name}.npy"), np.load(folder / f"{labels}.npy").astype(np.int64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_folds"), [("digits", 5), ("cifar10_test_mixpca256", 1), ("cifar10_test_v1", 1), ("fmnist_2000_v1", 1)]
)
def test_on_real_sets_the_classifier_is_as_right_as_its_consensus_and_knows_how_sure_it_is(
    real_data_dir: Path, name: str, num_folds: int
) -> None:
    """Heads are k-means runs on half of the dimensions each. True labels score; nothing else sees them. Of a fifth of
    the digits one image is a quarter of a point, so all fifths are kept back in turn."""
    features, true = real(real_data_dir, name)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(features))  # the files are sorted by class
    features, true = features[order], true[order]
    num_clusters = len(np.unique(true))
    centred = normalize(features.astype(np.float32) - features.mean(axis=0, dtype=np.float32))
    halves = [rng.permutation(features.shape[1])[: features.shape[1] // 2] for _ in range(6)]
    heads = [
        MiniBatchKMeans(num_clusters, n_init=1, random_state=seed).fit_predict(centred[:, half])
        for seed, half in enumerate(halves)
    ]
    consensus = cluster_ensemble(np.array(heads), num_clusters, random_state=0).labels
    counts = np.zeros((num_clusters, num_clusters))
    np.add.at(counts, (consensus, true), 1)
    class_of = linear_sum_assignment(-counts)[1]
    rights, errors = [], []
    for fold in range(num_folds):
        is_fresh = np.arange(len(features)) % 5 == fold
        targets = np.where(is_fresh, -1, consensus)
        config = ClassifierConfig(num_iterations=1000)
        classifier = fit_classifier(
            features, targets, config, num_clusters=num_clusters, seed=fold, outlier_quantile=0.999
        )
        found = classifier.label(features[is_fresh])
        errors.append(expected_calibration_error(found.consensus_probability, found.cluster == consensus[is_fresh]))
        rights.append(
            ((class_of[found.cluster] == true[is_fresh]).mean(), (class_of[consensus] == true)[is_fresh].mean())
        )
    accuracy, of_consensus = np.mean(rights, axis=0)
    assert accuracy >= of_consensus - MAX_ACCURACY_LOSS
    assert max(errors) < MAX_CALIBRATION_ERROR
