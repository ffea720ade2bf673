"""The trained linear classifier: labels images from their features, with the calibrated probability of the cluster, and
saves itself as bytes.

It is trained by :mod:`icce_ray.classifier.self_training` (docs/METHOD.md, "Self-training"). Using it needs neither
torch nor Ray. The probability is fitted on held-out images (docs/METHOD.md, "Consensus probability and outliers"):

    p = (1 - floor) softmax(logits / T) + floor / K

T is the temperature of Guo et al. (ICML 2017). The floor [ours] models noise in the consensus labels: it limits how
often any answer can be right, which no temperature can express (calibration error 0.08 to 0.15 with T alone, 20% of the
labels redrawn at random). Neither changes which cluster is the most probable.

Shapes: n images, D dimensions, K clusters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from icce_ray.classifier.outliers import Float32Array, OutlierModel
from icce_ray.errors import InputError

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]

TEMPERATURE_BOUNDS = (0.02, 50.0)
FLOOR_BOUNDS = (1e-6, 0.9)
STARTS = ((1.0, 0.001), (1.0, 0.1), (0.3, 0.3))
"""Temperature and floor to start from: the loss is not convex in the floor."""
MAX_BINS = 15
MIN_IMAGES_PER_BIN = 25
CHUNK_ROWS = 256
"""Rows scored at a time, few enough for their intermediate results to stay in the processor's cache."""
NUM_PROBABILITY_BINS = 20
NOISE, UNKNOWN = -1, -2
"""Special values of a given cluster: the image is known to have none; the classifier predicts it."""
MODEL_NAME = "classifier.safetensors"
DESCRIPTION_NAME = "classifier.json"
"""Parts of the classifier artifact."""
FORMAT_VERSION = 3


def calibrate(logits_nK: FloatArray, temperature: float, floor: float) -> npt.NDArray[np.float32]:
    """Turn (n, K) logits into (n, K) float32 probabilities; each row sums to 1."""
    p_nK = softmax(logits_nK / np.float32(temperature), axis=1)
    return np.asarray(p_nK * (1 - floor) + floor / logits_nK.shape[1], dtype=np.float32)


def fit_calibration(logits_nK: FloatArray, labels_n: IntArray) -> tuple[float, float]:
    """The temperature and the floor that minimise the cross-entropy of the calibrated probabilities of held-out images
    with their consensus clusters, 0..K-1.

    Targets are smoothed by 1 / (n + 2) (Platt, 1999): otherwise images that are all predicted correctly would push
    every probability to 1. log T has a standard normal prior [ours]: otherwise the same images would push T to 0, and
    an image half-way between two clusters would be as certain as any other.
    """
    num_images, num_clusters = logits_nK.shape
    logits = np.asarray(logits_nK, dtype=np.float64)
    smoothing = 1.0 / (num_images + 2)
    targets_nK = np.full(logits.shape, smoothing / num_clusters)
    targets_nK[np.arange(num_images), labels_n] += 1.0 - smoothing

    def loss(logs: npt.NDArray[np.float64]) -> float:
        temperature, floor = np.exp(logs)
        prior = logs[0] ** 2 / (2 * num_images)
        log_p_nK = log_softmax(logits / temperature, axis=1) + np.log1p(-floor)
        log_p_nK = np.logaddexp(log_p_nK, np.log(floor / num_clusters))
        return float(prior - (targets_nK * log_p_nK).sum(axis=1).mean())

    bounds = np.log([TEMPERATURE_BOUNDS, FLOOR_BOUNDS])
    fits = [minimize(loss, np.log(start), method="L-BFGS-B", bounds=bounds) for start in STARTS]
    best = min(fits, key=lambda fit: float(fit.fun))
    temperature, floor = np.exp(best.x)
    return float(temperature), float(floor)


def expected_calibration_error(probability_n: FloatArray, is_right_n: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error: mean gap between the probability of the predicted cluster and the accuracy, over bins
    of equal size (0 is perfect): at most 15 of at least 25 images each, since the noise of small bins would count as
    error."""
    num_images = len(probability_n)
    if not num_images:
        return 0.0
    order = np.argsort(probability_n, kind="stable")
    bins = np.array_split(order, max(1, min(MAX_BINS, num_images // MIN_IMAGES_PER_BIN)))
    gaps = [len(rows) * abs(float(probability_n[rows].mean()) - float(is_right_n[rows].mean())) for rows in bins]
    return float(sum(gaps) / num_images)


@dataclass(frozen=True)
class Prediction:
    """Predictions for n images."""

    cluster: npt.NDArray[np.int32]
    """(n,) 0..K-1, or NOISE."""
    consensus_probability: Float32Array
    """(n,) 0 to 1: calibrated probability that `cluster` is the image's cluster in the consensus; 0 for noise. It says
    how sure the classifier is of the consensus, not how right the consensus is."""
    second_choice: npt.NDArray[np.int32]
    """(n,) the most probable other cluster; for noise the most probable of all."""
    outlier_score: Float32Array
    """(n,) distance from the training images, at least 0, about 1 for an ordinary image (see outliers.py)."""
    is_outlier: npt.NDArray[np.bool_]
    """(n,) whether the score is above the classifier's threshold."""


@dataclass(frozen=True)
class LinearClassifier:
    """Labels images from their features. Made by :func:`~icce_ray.classifier.self_training.fit_classifier`."""

    mean: Float32Array
    """(D,) subtracted from the features, which are then divided by `scale`."""
    scale: float
    weights: Float32Array
    """(D, K)."""
    bias: Float32Array
    """(K,)."""
    temperature: float
    probability_floor: float
    """With `temperature`: the calibration, see :func:`calibrate`."""
    outliers: OutlierModel
    outlier_threshold: float
    """Scores above it are outliers."""
    cluster_sizes: npt.NDArray[np.int64]
    """(K,) images per cluster in the consensus."""
    learning_rate: float
    """The one that was chosen from the grid."""
    num_diverged: int
    """Learning rates of the grid that diverged."""
    num_holdout: int
    holdout_agreement: float
    """Share of the held-out images whose predicted cluster is their consensus cluster."""
    ece: float
    """Expected calibration error on the held-out images, against their consensus clusters."""
    holdout_probability: npt.NDArray[np.int64]
    """Held-out images by probability, in NUM_PROBABILITY_BINS equal bins from 0 to 1."""
    holdout_mean_probability: float
    holdout_outlier_rate: float
    """Share of the held-out images that are outliers."""

    @property
    def num_clusters(self) -> int:
        return len(self.bias)

    @property
    def num_dims(self) -> int:
        return len(self.mean)

    def logits(self, features: FloatArray) -> Float32Array:
        """(n, K) float32 logits of (n, D) features, not calibrated."""
        logits_nK = np.empty((len(features), self.num_clusters), dtype=np.float32)
        for rows, x_nD in self._scaled_chunks(features):
            logits_nK[rows] = x_nD @ self.weights + self.bias
        return logits_nK

    def predict_proba(self, features: FloatArray) -> Float32Array:
        """(n, K) float32 calibrated probabilities of (n, D) features. Raises InputError: wrong number of dimensions."""
        return calibrate(self.logits(features), self.temperature, self.probability_floor)

    def predict(self, features: FloatArray) -> npt.NDArray[np.int32]:
        """(n,) int32 most probable cluster of each row."""
        return np.asarray(self.logits(features).argmax(axis=1), dtype=np.int32)

    def label(self, features: FloatArray, given: IntArray | None = None) -> Prediction:
        """Label images, (n, D) features as in training, in one pass, without holding n x K values. Clusters that are
        already `given` (n,) are kept, NOISE among them; UNKNOWN stands for the others. Raises InputError: wrong number
        of dimensions."""
        num_images = len(features)
        cluster, second_choice = np.empty(num_images, dtype=np.int32), np.empty(num_images, dtype=np.int32)
        probability, score = np.empty(num_images, dtype=np.float32), np.empty(num_images, dtype=np.float32)
        for rows, x_nD in self._scaled_chunks(features):
            logits_nK = x_nD @ self.weights
            logits_nK += self.bias
            predicted = logits_nK.argmax(axis=1)
            score[rows] = self.outliers.score(x_nD, predicted)
            cluster[rows] = predicted if given is None else np.where(given[rows] != UNKNOWN, given[rows], predicted)
            is_noise = cluster[rows] == NOISE
            own = np.arange(len(x_nD)), np.where(is_noise, predicted, cluster[rows])
            # The calibrated softmax, for one cluster of each row.
            top_n, own_n = logits_nK[own[0], predicted], logits_nK[own]
            logits_nK[own] = -np.inf
            second_choice[rows] = np.where(is_noise, predicted, logits_nK.argmax(axis=1))
            logits_nK[own] = own_n
            logits_nK -= top_n[:, None]
            logits_nK /= np.float32(self.temperature)
            sums_n = np.exp(logits_nK, out=logits_nK).sum(axis=1)
            p_n = logits_nK[own] / sums_n
            p_n = p_n * (1 - self.probability_floor) + self.probability_floor / self.num_clusters
            probability[rows] = np.where(is_noise, 0.0, p_n)
        return Prediction(cluster, probability, second_choice, score, np.asarray(score > self.outlier_threshold))

    def to_bytes(self) -> bytes:
        """The classifier as a safetensors file, with the scalars as JSON in its header."""
        tensors, numbers = {}, {}
        for name, value in (vars(self) | vars(self.outliers)).items():
            if isinstance(value, np.ndarray):
                tensors[name] = np.ascontiguousarray(value)
            elif not isinstance(value, OutlierModel):
                numbers[name] = value
        # A single key: safetensors doesn't fix the order of several, and equal classifiers must give equal bytes.
        header = {"numbers": json.dumps(numbers | {"format_version": FORMAT_VERSION}, sort_keys=True)}
        return safetensors.numpy.save(tensors, metadata=header)

    @classmethod
    def from_bytes(cls, data: bytes) -> LinearClassifier:
        """Read what :meth:`to_bytes` wrote. Raises InputError: not a classifier file, or one of another format
        version."""
        try:
            tensors = safetensors.numpy.load(data)
            header_size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + header_size])["__metadata__"]
            values = {**tensors, **json.loads(header["numbers"])}
            version = values.pop("format_version")
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"this is not a classifier file: {error!r}") from None
        if version != FORMAT_VERSION:
            raise InputError(f"the classifier file has format {version}; this version reads format {FORMAT_VERSION}")
        outliers = OutlierModel(**{field.name: values.pop(field.name) for field in fields(OutlierModel)})
        return cls(outliers=outliers, **values)

    def _scaled_chunks(self, features: FloatArray) -> Iterator[tuple[slice, Float32Array]]:
        """Centred and scaled features, CHUNK_ROWS at a time."""
        if features.ndim != 2 or features.shape[1] != self.num_dims:
            raise InputError(
                f"features have shape {features.shape}; the classifier takes (n, {self.num_dims}): "
                "use the backbone and features it was trained on"
            )
        for start in range(0, len(features), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            yield rows, center_and_scale(features[rows], self.mean, self.scale)


def center_and_scale(features_nD: FloatArray, mean_D: Float32Array, scale: float) -> Float32Array:
    """(features - mean) / scale as a new float32 array."""
    x_nD = np.array(features_nD, dtype=np.float32)
    x_nD -= mean_D
    x_nD /= np.float32(scale)
    return x_nD


def probability_histogram(probability_n: FloatArray) -> npt.NDArray[np.int64]:
    """Number of images by probability, in NUM_PROBABILITY_BINS equal bins from 0 to 1."""
    bins_n = np.minimum((probability_n * NUM_PROBABILITY_BINS).astype(np.int64), NUM_PROBABILITY_BINS - 1)
    return np.bincount(bins_n, minlength=NUM_PROBABILITY_BINS).astype(np.int64)
