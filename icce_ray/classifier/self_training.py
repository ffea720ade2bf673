"""Self-training: a linear classifier on the frozen features, with the consensus labels as targets.

The method is in docs/METHOD.md, "Self-training". Features are centred and divided by one number. A tenth of the images
is held out: on them the learning rate is chosen by agreement with the consensus, and the probability is calibrated. The
chosen classifier is used as trained, without the held-out images: training it again on all would void the calibration.

The classifiers of the grid are independent. So several processes divide the grid, not the batch: each trains some
learning rates on all images and sends only its best one. The result is that of one process.

Shapes: N images, D dimensions, K clusters.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

from icce_ray.classifier.linear import (
    FloatArray,
    IntArray,
    LinearClassifier,
    calibrate,
    center_and_scale,
    expected_calibration_error,
    fit_calibration,
    probability_histogram,
)
from icce_ray.classifier.outliers import Float32Array, fit_outlier_rule
from icce_ray.config import ClassifierConfig
from icce_ray.errors import InputError
from icce_ray.random_numbers import sampled_rows
from icce_ray.runtime.progress import QUIET, Progress

NUM_EPOCHS = 100
MIN_STEPS, MAX_STEPS = 1_000, 12_500
"""`classifier.num_iterations: auto`: this many passes over the images, within these bounds."""
CHUNK_ROWS = 4_096
MAX_CACHED_BYTES = 2**30
"""Scaled features of the training images are kept in memory up to this size."""
MAX_OUTLIER_IMAGES = 50_000
"""The outlier model is fitted on a random sample of at most this many training images."""


@dataclass(frozen=True)
class Candidate:
    """The best classifier that one process trained."""

    position: int
    """Position of its learning rate in the grid; -1 if all diverged."""
    agreement: float
    """Share of the held-out images whose predicted cluster is their consensus cluster."""
    loss: float
    """Mean cross-entropy on the held-out images."""
    weights: Float32Array
    """(D, K)."""
    bias: Float32Array
    """(K,)."""
    num_diverged: int
    """Learning rates of this process that diverged."""


class SelfTraining:
    """The training problem: training and held-out images, and the scale of their features, which may be memory-mapped
    and are not changed. Consensus clusters are 0..K-1; -1 for images that took no part. The same seed gives the same
    classifier. `outlier_quantile`: share of the training images below the outlier threshold. Raises InputError: fewer
    than 2 labelled images, or labels out of range."""

    def __init__(
        self,
        features_ND: FloatArray,
        labels_N: IntArray,
        config: ClassifierConfig,
        *,
        num_clusters: int,
        seed: int,
        outlier_quantile: float,
    ) -> None:
        rows, labels = _labelled(features_ND, labels_N, num_clusters)
        self.features_ND = features_ND
        self.config = config
        self.num_clusters = num_clusters
        self.outlier_quantile = outlier_quantile
        self.cluster_sizes = np.bincount(labels, minlength=num_clusters).astype(np.int64)
        seeds = np.random.SeedSequence([seed, 4]).generate_state(3)
        split_seed, self.batch_seed, self.sample_seed = (int(s) for s in seeds)
        order = np.random.default_rng(split_seed).permutation(len(rows))
        num_holdout = min(max(1, round(config.holdout_fraction * len(rows))), len(rows) - 1)
        holdout, train = np.sort(order[:num_holdout]), np.sort(order[num_holdout:])
        self.train_rows, self.train_labels = rows[train], labels[train]
        self.holdout_rows, self.holdout_labels = rows[holdout], labels[holdout]
        self.mean_D, self.scale = _mean_and_scale(features_ND, self.train_rows)

    def train(self, positions: Sequence[int], *, device: str = "cpu", progress: Progress = QUIET) -> Candidate:
        """Train the learning rates at `positions` of the grid side by side and return the best classifier."""
        # Imported here because torch takes seconds to import, and labelling images doesn't need it.
        from icce_ray.classifier.sgd import train_grid

        num_train, num_dims = len(self.train_rows), self.features_ND.shape[1]
        batch_size = min(self.config.batch_size, num_train)
        cached: Float32Array | None = None
        if num_train * num_dims * 4 <= MAX_CACHED_BYTES:
            cached = self._read(self.train_rows)
        grid = train_grid(
            lambda rows: cached[rows] if cached is not None else self._read(self.train_rows[rows]),
            self.train_labels,
            num_clusters=self.num_clusters,
            num_dims=num_dims,
            learning_rates=tuple(self.config.learning_rates[position] for position in positions),
            momentum=self.config.momentum,
            batch_size=batch_size,
            num_steps=num_steps(self.config, num_train),
            seed=self.batch_seed,
            device=device,
            on_step=progress.update,
        )
        num_diverged = len(positions) - len(grid.positions)
        empty = np.empty((0, 0), dtype=np.float32)
        candidates = [Candidate(-1, -math.inf, math.inf, empty, empty.ravel(), num_diverged)]
        x_nD = self._read(self.holdout_rows)
        for index, weights_DK, bias_K in zip(*grid, strict=True):
            logits_nK = x_nD @ weights_DK + bias_K
            agreement = float((logits_nK.argmax(axis=1) == self.holdout_labels).mean())
            own_n = logits_nK[np.arange(len(x_nD)), self.holdout_labels]
            loss = float((logsumexp(logits_nK, axis=1) - own_n).mean())  # the mean cross-entropy
            candidates.append(Candidate(positions[index], agreement, loss, weights_DK, bias_K, num_diverged))
        return _best(candidates)

    def finish(self, candidates: Sequence[Candidate]) -> LinearClassifier:
        """Choose among the candidates, which together cover the grid; calibrate it and fit the outlier rule. Raises
        InputError: every learning rate diverged."""
        best = _best(candidates)
        rates = self.config.learning_rates
        if best.position < 0:
            raise InputError(
                f"classifier.learning_rates: the classifier diverged with all of them, {min(rates):g} to "
                f"{max(rates):g}; give smaller ones"
            )
        x_nD = self._read(self.holdout_rows)
        logits_nK = x_nD @ best.weights + best.bias
        temperature, floor = fit_calibration(logits_nK, self.holdout_labels)
        predicted_n = logits_nK.argmax(axis=1)
        probability_n = calibrate(logits_nK, temperature, floor).max(axis=1)

        sample_nD = self._read(
            self.train_rows[sampled_rows(len(self.train_rows), MAX_OUTLIER_IMAGES, self.sample_seed)]
        )
        sample_labels_n = (sample_nD @ best.weights + best.bias).argmax(axis=1)
        outliers, threshold = fit_outlier_rule(sample_nD, sample_labels_n, self.num_clusters, self.outlier_quantile)
        return LinearClassifier(
            mean=self.mean_D,
            scale=self.scale,
            weights=best.weights,
            bias=best.bias,
            temperature=temperature,
            probability_floor=floor,
            outliers=outliers,
            outlier_threshold=threshold,
            cluster_sizes=self.cluster_sizes,
            learning_rate=rates[best.position],
            num_diverged=sum(candidate.num_diverged for candidate in candidates),
            num_holdout=len(self.holdout_rows),
            holdout_agreement=best.agreement,
            ece=expected_calibration_error(probability_n, predicted_n == self.holdout_labels),
            holdout_probability=probability_histogram(probability_n),
            holdout_mean_probability=float(probability_n.mean(dtype=np.float64)),
            holdout_outlier_rate=float((outliers.score(x_nD, predicted_n) > threshold).mean()),
        )

    def _read(self, rows: IntArray) -> Float32Array:
        return center_and_scale(self.features_ND[rows], self.mean_D, self.scale)


def fit_classifier(
    features_ND: FloatArray, labels_N: IntArray, config: ClassifierConfig, *, progress: Progress = QUIET,
    device: str = "cpu", **problem: Any,
) -> LinearClassifier:  # fmt: skip
    """Self-training in this process; arguments as :class:`SelfTraining` and :meth:`SelfTraining.train`. Raises
    InputError: fewer than 2 labelled images, labels out of range, or every learning rate diverged."""
    training = SelfTraining(features_ND, labels_N, config, **problem)
    return training.finish([training.train(range(len(config.learning_rates)), device=device, progress=progress)])


def num_steps(config: ClassifierConfig, num_images: int) -> int:
    """SGD steps on `num_images` training images."""
    if config.num_iterations != "auto":
        return config.num_iterations
    steps = math.ceil(NUM_EPOCHS * num_images / min(config.batch_size, num_images))
    return min(max(MIN_STEPS, steps), MAX_STEPS)


def _best(candidates: Sequence[Candidate]) -> Candidate:
    """The highest agreement with the consensus; ties go to the lower loss, then to the smaller position."""
    return min(candidates, key=lambda candidate: (-candidate.agreement, candidate.loss, candidate.position))


def _labelled(features_ND: FloatArray, labels_N: IntArray, num_clusters: int) -> tuple[IntArray, IntArray]:
    """Rows that have a consensus label, and those labels."""
    if features_ND.ndim != 2 or len(features_ND) != len(labels_N):
        raise InputError(f"features of shape {features_ND.shape} do not fit {len(labels_N)} labels")
    rows = np.flatnonzero(labels_N >= 0)
    if len(rows) < 2:
        raise InputError(f"a classifier needs at least 2 labelled images, there are {len(rows)}")
    labels = np.asarray(labels_N[rows], dtype=np.int64)
    if labels.max() >= num_clusters:
        raise InputError(f"there is a label {labels.max()}, but only {num_clusters} clusters: 0 to {num_clusters - 1}")
    return rows, labels


def _mean_and_scale(features_ND: FloatArray, rows: IntArray) -> tuple[Float32Array, float]:
    """Mean feature (D,), and the median image's distance to it as a root mean square over the dimensions.

    The median, because with the mean one image with features a hundred times larger would flatten all others.
    """
    total_D = np.zeros(features_ND.shape[1])
    for chunk in _chunks(len(rows)):
        total_D += features_ND[rows[chunk]].sum(axis=0, dtype=np.float64)
    mean_D = (total_D / len(rows)).astype(np.float32)
    squares_N = np.empty(len(rows))
    for chunk in _chunks(len(rows)):
        squares_N[chunk] = ((features_ND[rows[chunk]] - mean_D).astype(np.float64) ** 2).sum(axis=1)
    square = float(np.median(squares_N)) or float(squares_N.mean())
    return mean_D, math.sqrt(square / features_ND.shape[1]) or 1.0


def _chunks(num_rows: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK_ROWS) for start in range(0, num_rows, CHUNK_ROWS))
