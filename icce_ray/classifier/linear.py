"""Self-training (METHOD section 4): a linear classifier on the frozen features, with the consensus labels as targets.

It is what labels images that no head has seen. Features are centred and divided by one number, both part of the
model, so that a learning rate means the same for every backbone; scaling each dimension by itself was measured and is
no better (and blows up dimensions that hardly vary). A tenth of the images is kept back: on them the learning rate is
chosen by agreement with the consensus, and the calibration is fitted that makes the probabilities honest. The
classifier that is returned is the chosen one as trained, without those images: retraining on all would void its
calibration.

Shapes: N images, D dims, K clusters, G settings of the grid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from scipy.special import logsumexp

from icce_ray.classifier.calibration import calibrate, expected_calibration_error, fit_calibration
from icce_ray.classifier.outliers import OutlierModel, fit_outlier_rule
from icce_ray.config import ClassifierConfig
from icce_ray.errors import InputError
from icce_ray.progress import Progress

Float32Array = npt.NDArray[np.float32]
FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]

MIN_STEPS = 1_000
"""Steps that even a small set gets."""
CHUNK_ROWS = 4_096
MAX_PREPARED_BYTES = 2**30
"""Up to this size the scaled features of the training images are kept in memory."""
MAX_OUTLIER_IMAGES = 50_000
"""The outlier model is fitted on a seeded sample of at most this many images."""
FORMAT_VERSION = 1


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

    @property
    def num_clusters(self) -> int:
        return len(self.bias)

    @property
    def num_dims(self) -> int:
        return len(self.mean)

    def logits(self, features: FloatArray) -> Float32Array:
        """(n, K) float32 scores of (n, D) features, not yet calibrated."""
        return self._by_chunk(features, lambda x_nD: x_nD @ self.weights + self.bias, (self.num_clusters,))

    def predict_proba(self, features: FloatArray) -> Float32Array:
        """(n, K) float32 calibrated probabilities of (n, D) features.

        Raises:
            InputError: the features have another number of dimensions.
        """
        return calibrate(self.logits(features), self.temperature, self.confidence_floor)

    def predict(self, features: FloatArray) -> npt.NDArray[np.int32]:
        """(n,) int32: the most probable cluster of each row."""
        return np.asarray(self.logits(features).argmax(axis=1), dtype=np.int32)

    def outlier_score(self, features: FloatArray) -> Float32Array:
        """(n,) float32: distance to what the classifier has seen, about 1 for an ordinary image (see outliers.py)."""
        return self._by_chunk(features, self.outliers.score, ())

    def is_outlier(self, features: FloatArray) -> npt.NDArray[np.bool_]:
        """(n,) bool: the score is above the threshold."""
        return np.asarray(self.outlier_score(features) > self.outlier_threshold)

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

    def _by_chunk(self, features: FloatArray, function: Any, shape: tuple[int, ...]) -> Float32Array:
        if features.ndim != 2 or features.shape[1] != self.num_dims:
            raise InputError(
                f"features have shape {features.shape}; the classifier takes (n, {self.num_dims}): "
                "use the backbone and features it was trained on"
            )
        result = np.empty((len(features), *shape), dtype=np.float32)
        for rows in _chunks(len(features)):
            result[rows] = function(_prepare(features[rows], self.mean, self.scale))
        return result


def fit_classifier(
    features_ND: FloatArray,
    labels_N: IntArray,
    config: ClassifierConfig,
    *,
    num_clusters: int,
    seed: int,
    outlier_quantile: float,
    progress: Progress | None = None,
    device: str = "cpu",
) -> LinearClassifier:
    """Train the grid, choose without labels, calibrate.

    Args:
        features_ND: floating point; may be memory-mapped, is not changed.
        labels_N: consensus clusters 0..K-1; -1 for images that took no part.
        seed: of the split and the batches. The same seed gives the same classifier.
        outlier_quantile: share of these images that lie below the outlier threshold.
        device: of the training, "cpu" or "cuda".

    Raises:
        InputError: fewer than 2 labelled images, labels out of range, or every learning rate diverged.
    """
    # Imports torch, which those who only label images need not wait for.
    from icce_ray.classifier.sgd import train_grid

    rows, labels = _check(features_ND, labels_N, num_clusters)
    sizes_K = np.bincount(labels, minlength=num_clusters).astype(np.int64)
    split_seed, batch_seed, sample_seed = (int(s) for s in np.random.SeedSequence([seed, 4]).generate_state(3))
    order = np.random.default_rng(split_seed).permutation(len(rows))
    num_holdout = min(max(1, round(config.holdout_fraction * len(rows))), len(rows) - 1)
    holdout, train = np.sort(order[:num_holdout]), np.sort(order[num_holdout:])

    mean_D, scale = _mean_and_scale(features_ND, rows[train])
    train_rows, train_labels = rows[train], labels[train]
    prepared: Float32Array | None = None
    if len(train) * features_ND.shape[1] * 4 <= MAX_PREPARED_BYTES:
        prepared = _prepare(features_ND[train_rows], mean_D, scale)

    def read_rows(indices: IntArray) -> Float32Array:
        if prepared is not None:
            return prepared[indices]
        return _prepare(features_ND[train_rows[indices]], mean_D, scale)

    batch_size = min(config.batch_size, len(train))
    num_steps = min(config.num_iterations, max(MIN_STEPS, math.ceil(config.max_epochs * len(train) / batch_size)))
    grid = train_grid(
        read_rows,
        train_labels,
        num_clusters=num_clusters,
        num_dims=features_ND.shape[1],
        learning_rates=config.learning_rates,
        momentum=config.momentum,
        batch_size=batch_size,
        num_steps=num_steps,
        seed=batch_seed,
        device=device,
        on_step=progress.update if progress is not None else None,
    )
    if not grid.learning_rates:
        raise InputError(
            f"classifier.learning_rates: all of them, {min(config.learning_rates):g} to "
            f"{max(config.learning_rates):g}, made the classifier diverge; give smaller ones"
        )
    holdout_labels = labels[holdout]
    x_nD = _prepare(features_ND[rows[holdout]], mean_D, scale)
    logits_GnK = np.matmul(x_nD, grid.weights) + grid.biases[:, None]
    chosen, agreement = _choose(logits_GnK, holdout_labels)
    temperature, floor = fit_calibration(logits_GnK[chosen], holdout_labels)
    confidence_n = calibrate(logits_GnK[chosen], temperature, floor).max(axis=1)
    is_right_n = logits_GnK[chosen].argmax(axis=1) == holdout_labels

    sample = _sample(len(train), MAX_OUTLIER_IMAGES, sample_seed)
    outliers, threshold = fit_outlier_rule(read_rows(sample), train_labels[sample], num_clusters, outlier_quantile)
    return LinearClassifier(
        mean=mean_D,
        scale=scale,
        weights=grid.weights[chosen],
        bias=grid.biases[chosen],
        temperature=temperature,
        confidence_floor=floor,
        outliers=outliers,
        outlier_threshold=threshold,
        cluster_sizes=sizes_K,
        learning_rate=grid.learning_rates[chosen],
        num_diverged=grid.num_diverged,
        num_holdout=num_holdout,
        holdout_agreement=agreement,
        ece=expected_calibration_error(confidence_n, is_right_n),
    )


def _check(features_ND: FloatArray, labels_N: IntArray, num_clusters: int) -> tuple[IntArray, IntArray]:
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


def _choose(logits_GnK: Float32Array, labels_n: IntArray) -> tuple[int, float]:
    """Setting that agrees best with the consensus, equals decided by the lower cross-entropy; and its agreement."""
    agreement_G = (logits_GnK.argmax(axis=2) == labels_n).mean(axis=1)
    of_label_Gn = np.take_along_axis(logits_GnK, labels_n[None, :, None], axis=2)[:, :, 0]
    loss_G = (logsumexp(logits_GnK, axis=2) - of_label_Gn).mean(axis=1)
    chosen = int(np.lexsort((loss_G, -agreement_G))[0])
    return chosen, float(agreement_G[chosen])


def _mean_and_scale(features_ND: FloatArray, rows: IntArray) -> tuple[Float32Array, float]:
    """Mean feature (D,), and the root mean square over the dimensions of the median image's distance to it.

    The median, or one image with features a hundred times larger would leave the others without any.
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


def _prepare(features_nD: FloatArray, mean_D: Float32Array, scale: float) -> Float32Array:
    return (np.asarray(features_nD, dtype=np.float32) - mean_D) / np.float32(scale)


def _sample(num_images: int, max_images: int, seed: int) -> IntArray:
    if num_images <= max_images:
        return np.arange(num_images)
    return np.sort(np.random.default_rng(seed).choice(num_images, max_images, replace=False))


def _chunks(num_rows: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK_ROWS) for start in range(0, num_rows, CHUNK_ROWS))


def _own_fields(instance: Any) -> dict[str, Any]:
    return {field.name: getattr(instance, field.name) for field in fields(instance)}
