"""How new images differ from those the model was trained on: cluster shares, confidence, outlier rate.

Shares and confidences are compared by the population stability index, sum (p - q) ln(p / q) over bins, a measure the
field knows: below 0.1 alike, above 0.25 a different population. Few images differ by chance alone, by about
(bins - 1)(1/n + 1/m), which is given beside it.

What is compared with: cluster sizes of the consensus; confidence and outlier rate of the images kept back in training.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.assign.assignment_parts import Tally
from icce_ray.classifier.linear import LinearClassifier

NUM_MOST_CHANGED = 5
SMOOTHING = 0.5
"""Images added to each bin, so that an empty one gives no infinite index."""


def stability_index(counts_a: npt.ArrayLike, counts_b: npt.ArrayLike) -> dict[str, float]:
    """`index` of two histograms over the same bins, and `by_chance`: what two samples of one population would give."""
    a, b = np.asarray(counts_a, dtype=np.float64), np.asarray(counts_b, dtype=np.float64)
    used = (a + b) > 0
    if a.sum() == 0 or b.sum() == 0:
        return {"index": 0.0, "by_chance": 0.0}
    p, q = a[used] + SMOOTHING, b[used] + SMOOTHING
    p, q = p / p.sum(), q / q.sum()
    by_chance = (used.sum() - 1) * (1 / a.sum() + 1 / b.sum())
    return {"index": float(((p - q) * np.log(p / q)).sum()), "by_chance": float(by_chance)}


def summarize_drift(tally: Tally, classifier: LinearClassifier) -> dict[str, Any]:
    """The summary, as JSON: num_images, clusters (training_share and new_share of each), those that changed most,
    cluster_shares and confidence (stability indices), mean_confidence and outlier_rate (training, new)."""
    sizes_K = np.array(tally.sizes(classifier.num_clusters))
    before_K = classifier.cluster_sizes / max(int(classifier.cluster_sizes.sum()), 1)
    now_K = sizes_K / max(tally.num_images, 1)
    changed = np.argsort(-np.abs(now_K - before_K), kind="stable")[:NUM_MOST_CHANGED]
    return {
        "num_images": tally.num_images,
        "num_training_images": int(classifier.cluster_sizes.sum()),
        "cluster_shares": stability_index(classifier.cluster_sizes, sizes_K),
        "confidence": stability_index(classifier.holdout_confidence, tally.confidence_counts),
        "mean_confidence": {
            "training": classifier.holdout_mean_confidence,
            "new": tally.sum_confidence / max(tally.num_images, 1),
        },
        "outlier_rate": {
            "training": classifier.holdout_outlier_rate,
            "new": tally.num_outliers / max(tally.num_images, 1),
        },
        "most_changed_clusters": [int(cluster) for cluster in changed],
        "clusters": [
            {"cluster": cluster, "training_share": float(before), "new_share": float(now)}
            for cluster, (before, now) in enumerate(zip(before_K, now_K, strict=True))
        ],
        "confidence_histograms": {
            "training": classifier.holdout_confidence.tolist(),
            "new": list(tally.confidence_counts),
        },
    }


def drift_lines(drift: dict[str, Any]) -> list[str]:
    """The summary in words, a line each."""

    def index(name: str) -> str:
        return f"stability index {drift[name]['index']:.3f} (by chance {drift[name]['by_chance']:.3f})"

    def pair(name: str, form: str) -> str:
        return f"{drift[name]['new']:{form}} (training {drift[name]['training']:{form}})"

    return [
        f"clusters     {index('cluster_shares')}",
        f"confidence   mean {pair('mean_confidence', '.3f')}, {index('confidence')}",
        f"outliers     {pair('outlier_rate', '.2%')}",
    ]
