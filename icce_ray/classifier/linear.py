"""The trained linear classifier: labels images from their features, and saves itself as bytes.

It is trained by :mod:`icce_ray.classifier.self_training` (docs/METHOD.md, "Self-training"). Using it needs neither
torch nor Ray.

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

from icce_ray.classifier.calibration import FloatArray, IntArray, calibrate
from icce_ray.classifier.outliers import Float32Array, OutlierModel
from icce_ray.errors import InputError

CHUNK_ROWS = 256
"""Rows scored at a time, few enough for their intermediate results to stay in the processor's cache."""
NUM_PROBABILITY_BINS = 20
NOISE, UNKNOWN = -1, -2
"""Special values of a given cluster: the image is known to have none; the classifier predicts it."""
MODEL_NAME = "classifier.safetensors"
DESCRIPTION_NAME = "classifier.json"
"""Parts of the classifier artifact."""
FORMAT_VERSION = 3


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
    """With `temperature`: the calibration, see calibration.py."""
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
        """Label images in one pass, without holding n x K values. Raises InputError: wrong number of dimensions.

        Args:
            features: (n, D), the same kind of features as in training.
            given: (n,) clusters that are already known and are kept, NOISE among them, or UNKNOWN.
        """
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
