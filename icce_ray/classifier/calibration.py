"""Calibrated confidences, fitted on images that the classifier was not trained on.

p = (1 - floor) softmax(logits / T) + floor / K. T is temperature scaling (Guo et al., ICML 2017). The floor is [ours]:
consensus labels are noisy, so that no answer is right more often than the noise lets it, which no temperature can say
(measured with 20% of the labels redrawn at random: calibration error 0.08 to 0.15 with T alone). Neither changes which
cluster is the most probable. The smoothed targets are Platt's (1999).

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
"""Temperature and floor; the loss is not convex in the floor."""
MAX_BINS = 15
MIN_IMAGES_PER_BIN = 25


def calibrate(logits_nK: FloatArray, temperature: float, floor: float) -> npt.NDArray[np.float32]:
    """(n, K) float32 probabilities of (n, K) logits; each row sums to 1."""
    p_nK = softmax(logits_nK / np.float32(temperature), axis=1)
    return np.asarray(p_nK * (1 - floor) + floor / logits_nK.shape[1], dtype=np.float32)


def fit_calibration(logits_nK: FloatArray, labels_n: IntArray) -> tuple[float, float]:
    """The temperature and the floor that minimise the cross-entropy of the calibrated probabilities.

    Targets are smoothed by 1 / (n + 2): without that, held-out images that are all right would drive every confidence
    to 1. And log T has a standard normal prior [ours]: the same images would still drive T to 0, with the floor alone
    to say how sure an answer is, and an image half-way between two clusters would be as sure as any other.
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


def expected_calibration_error(confidence_n: FloatArray, is_right_n: npt.NDArray[np.bool_]) -> float:
    """Mean distance between confidence and share of right answers, over bins of equally many images (0 is perfect).

    At most 15 bins, and fewer where they would hold under 25 images: the noise of small bins counts as an error.
    """
    num_images = len(confidence_n)
    if not num_images:
        return 0.0
    order = np.argsort(confidence_n, kind="stable")
    bins = np.array_split(order, max(1, min(MAX_BINS, num_images // MIN_IMAGES_PER_BIN)))
    gaps = [len(rows) * abs(float(confidence_n[rows].mean()) - float(is_right_n[rows].mean())) for rows in bins]
    return float(sum(gaps) / num_images)
