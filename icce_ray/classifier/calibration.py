"""Calibrated probability of the consensus cluster, fitted on held-out images (docs/METHOD.md, "Consensus probability
and outliers").

    p = (1 - floor) softmax(logits / T) + floor / K

T is the temperature of Guo et al. (ICML 2017). The floor [ours] models noise in the consensus labels: it limits how
often any answer can be right, which no temperature can express (calibration error 0.08 to 0.15 with T alone, 20% of the
labels redrawn at random). Neither changes which cluster is the most probable.

Shapes: n images, K clusters.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]

TEMPERATURE_BOUNDS = (0.02, 50.0)
FLOOR_BOUNDS = (1e-6, 0.9)
STARTS = ((1.0, 0.001), (1.0, 0.1), (0.3, 0.3))
"""Temperature and floor to start from: the loss is not convex in the floor."""
MAX_BINS = 15
MIN_IMAGES_PER_BIN = 25


def calibrate(logits_nK: FloatArray, temperature: float, floor: float) -> npt.NDArray[np.float32]:
    """Turn (n, K) logits into (n, K) float32 probabilities; each row sums to 1."""
    p_nK = softmax(logits_nK / np.float32(temperature), axis=1)
    return np.asarray(p_nK * (1 - floor) + floor / logits_nK.shape[1], dtype=np.float32)


def fit_calibration(logits_nK: FloatArray, labels_n: IntArray) -> tuple[float, float]:
    """The temperature and the floor that minimise the cross-entropy of the calibrated probabilities.

    Targets are smoothed by 1 / (n + 2) (Platt, 1999): otherwise images that are all predicted correctly would push
    every probability to 1. log T has a standard normal prior [ours]: otherwise the same images would push T to 0, and
    an image half-way between two clusters would be as certain as any other.

    Args:
        logits_nK: logits of held-out images.
        labels_n: their consensus clusters, 0..K-1.
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
    """Expected calibration error: mean gap between probability and accuracy, over bins of equal size (0 is perfect).

    At most 15 bins of at least 25 images each: the noise of small bins would count as error.

    Args:
        probability_n: probability of the predicted cluster, 0 to 1.
        is_right_n: whether the prediction is right.
    """
    num_images = len(probability_n)
    if not num_images:
        return 0.0
    order = np.argsort(probability_n, kind="stable")
    bins = np.array_split(order, max(1, min(MAX_BINS, num_images // MIN_IMAGES_PER_BIN)))
    gaps = [len(rows) * abs(float(probability_n[rows].mean()) - float(is_right_n[rows].mean())) for rows in bins]
    return float(sum(gaps) / num_images)
