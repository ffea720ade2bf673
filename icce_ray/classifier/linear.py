"""The linear classifier that labels images no head has seen (METHOD section 4), as arrays and as bytes.

Features are centred and divided by one number, both part of the model. :mod:`icce_ray.classifier.self_training` makes
it; using it takes neither torch nor Ray.

Shapes: n images, D dims, K clusters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from icce_ray.classifier.calibration import calibrate
from icce_ray.classifier.outliers import OutlierModel
from icce_ray.errors import InputError

Float32Array = npt.NDArray[np.float32]
FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]

CHUNK_ROWS = 256
"""Rows scored at a time: what is made of them stays in the processor's cache."""
NUM_CONFIDENCE_BINS = 20
MODEL_NAME = "classifier.safetensors"
DESCRIPTION_NAME = "classifier.json"
"""Names of the parts of the classifier artifact."""
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Prediction:
    """What the classifier says of n images."""

    cluster: npt.NDArray[np.int32]
    """(n,) 0..K-1."""
    confidence: Float32Array
    """(n,) 0 to 1: the calibrated probability of `cluster`."""
    second_choice: npt.NDArray[np.int32]
    """(n,): the most probable other cluster."""
    outlier_score: Float32Array
    """(n,), at least 0: distance to what the classifier has seen, about 1 for an ordinary image (see outliers.py)."""
    is_outlier: npt.NDArray[np.bool_]
    """(n,): the score is above the classifier's threshold."""


@dataclass(frozen=True)
class LinearClassifier:
    """Labels images from their features. Made by :func:`fit_classifier` or :meth:`from_bytes`."""

    mean: Float32Array
    """(D,), taken from the features, which are then divided by `scale`."""
    scale: float
    weights: Float32Array
    """(D, K)."""
    bias: Float32Array
    """(K,)."""
    temperature: float
    confidence_floor: float
    """Calibration, see calibration.py."""
    outliers: OutlierModel
    outlier_threshold: float
    """Scores above it are outliers."""
    cluster_sizes: npt.NDArray[np.int64]
    """(K,) images per cluster among the targets."""
    learning_rate: float
    """The chosen setting of the grid."""
    num_diverged: int
    """Settings of the grid that were dropped."""
    num_holdout: int
    holdout_agreement: float
    """Share of the images kept back whose predicted cluster is their consensus cluster."""
    ece: float
    """Expected calibration error on the images kept back, against their consensus clusters."""
    holdout_confidence: npt.NDArray[np.int64]
    """Images kept back by their confidence, in NUM_CONFIDENCE_BINS equal steps from 0 to 1."""
    holdout_mean_confidence: float
    holdout_outlier_rate: float
    """Share of the images kept back that are outliers."""

    @property
    def num_clusters(self) -> int:
        return len(self.bias)

    @property
    def num_dims(self) -> int:
        return len(self.mean)

    def logits(self, features: FloatArray) -> Float32Array:
        """(n, K) float32 scores of (n, D) features, not yet calibrated."""
        logits_nK = np.empty((len(features), self.num_clusters), dtype=np.float32)
        for rows, x_nD in self._prepared(features):
            logits_nK[rows] = x_nD @ self.weights + self.bias
        return logits_nK

    def predict_proba(self, features: FloatArray) -> Float32Array:
        """(n, K) float32 calibrated probabilities of (n, D) features.

        Raises:
            InputError: the features have another number of dimensions.
        """
        return calibrate(self.logits(features), self.temperature, self.confidence_floor)

    def predict(self, features: FloatArray) -> npt.NDArray[np.int32]:
        """(n,) int32: the most probable cluster of each row."""
        return np.asarray(self.logits(features).argmax(axis=1), dtype=np.int32)

    def label(self, features: FloatArray, given: IntArray | None = None) -> Prediction:
        """All that is known of the images with (n, D) `features`, in one pass that keeps nothing of size n x K.

        Args:
            features: the same features that the classifier was trained on.
            given: (n,) clusters that images have already, and that are theirs; -1 for those that have none.

        Raises:
            InputError: the features have another number of dimensions.
        """
        num_images = len(features)
        cluster, second_choice = np.empty(num_images, dtype=np.int32), np.empty(num_images, dtype=np.int32)
        confidence, score = np.empty(num_images, dtype=np.float32), np.empty(num_images, dtype=np.float32)
        for rows, x_nD in self._prepared(features):
            logits_nK = x_nD @ self.weights
            logits_nK += self.bias
            predicted = logits_nK.argmax(axis=1)
            score[rows] = self.outliers.score(x_nD, predicted)
            cluster[rows] = predicted if given is None else np.where(given[rows] >= 0, given[rows], predicted)
            own = np.arange(len(x_nD)), cluster[rows]
            # The softmax of the calibration, for one cluster of each row.
            top_n, own_n = logits_nK[own[0], predicted], logits_nK[own]
            logits_nK[own] = -np.inf
            second_choice[rows] = logits_nK.argmax(axis=1)
            logits_nK[own] = own_n
            logits_nK -= top_n[:, None]
            logits_nK /= np.float32(self.temperature)
            sums_n = np.exp(logits_nK, out=logits_nK).sum(axis=1)
            p_n = logits_nK[own] / sums_n
            confidence[rows] = p_n * (1 - self.confidence_floor) + self.confidence_floor / self.num_clusters
        return Prediction(cluster, confidence, second_choice, score, np.asarray(score > self.outlier_threshold))

    def to_bytes(self) -> bytes:
        """A safetensors file; the numbers are JSON in its header."""
        tensors, numbers = {}, {}
        for name, value in {**_own_fields(self), **_own_fields(self.outliers)}.items():
            if isinstance(value, np.ndarray):
                tensors[name] = np.ascontiguousarray(value)
            elif not isinstance(value, OutlierModel):
                numbers[name] = value
        # One key: the order of several is not fixed, and equal classifiers are to be equal bytes.
        header = {"numbers": json.dumps(numbers | {"format_version": FORMAT_VERSION}, sort_keys=True)}
        return safetensors.numpy.save(tensors, metadata=header)

    @classmethod
    def from_bytes(cls, data: bytes) -> LinearClassifier:
        """The classifier that :meth:`to_bytes` wrote.

        Raises:
            InputError: the bytes are not such a file.
        """
        try:
            tensors = safetensors.numpy.load(data)
            header_size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + header_size])["__metadata__"]
            values = {**tensors, **json.loads(header["numbers"])}
            version = values.pop("format_version")
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"this is not a classifier file: {error!r}") from None
        if version != FORMAT_VERSION:
            raise InputError(f"the classifier file has format {version}, this version reads {FORMAT_VERSION}")
        outliers = OutlierModel(**{field.name: values.pop(field.name) for field in fields(OutlierModel)})
        return cls(outliers=outliers, **values)

    def _prepared(self, features: FloatArray) -> Iterator[tuple[slice, Float32Array]]:
        """Centred and scaled features, a few rows at a time."""
        if features.ndim != 2 or features.shape[1] != self.num_dims:
            raise InputError(
                f"features have shape {features.shape}; the classifier takes (n, {self.num_dims}): "
                "use the backbone and features it was trained on"
            )
        for start in range(0, len(features), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            yield rows, prepare(features[rows], self.mean, self.scale)


def prepare(features_nD: FloatArray, mean_D: Float32Array, scale: float) -> Float32Array:
    """Centred and scaled features, float32, a copy."""
    x_nD = np.array(features_nD, dtype=np.float32)
    x_nD -= mean_D
    x_nD /= np.float32(scale)
    return x_nD


def confidence_histogram(confidence_n: FloatArray) -> npt.NDArray[np.int64]:
    """Images by confidence, in NUM_CONFIDENCE_BINS equal steps from 0 to 1."""
    bins_n = np.minimum((confidence_n * NUM_CONFIDENCE_BINS).astype(np.int64), NUM_CONFIDENCE_BINS - 1)
    return np.bincount(bins_n, minlength=NUM_CONFIDENCE_BINS).astype(np.int64)


def _own_fields(instance: Any) -> dict[str, Any]:
    return {field.name: getattr(instance, field.name) for field in fields(instance)}
