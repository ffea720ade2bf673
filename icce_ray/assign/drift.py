"""Totals over labelled images, part by part; and how new images differ from the training images: cluster shares,
probability, outlier rate (docs/METHOD.md, "Drift").

Cluster shares and consensus probabilities are compared by the population stability index, sum (p - q) ln(p / q) over
bins: below 0.1 alike, above 0.25 a different population. A few images differ by chance alone, by about (bins - 1)(1/n +
1/m), which is reported beside the index.

New images are compared with the cluster sizes of the consensus, and with the probability and outlier rate of the images
held out in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.classifier.linear import NOISE, LinearClassifier, Prediction, probability_histogram

NUM_MOST_CHANGED = 5
SMOOTHING = 0.5
"""Added to each bin: an empty one would make the index infinite."""


@dataclass(frozen=True)
class Totals:
    """Totals of the images of one or several parts; K clusters."""

    num_in_consensus: int
    """Images that took part in the consensus."""
    num_noise: int
    """Images without a cluster. They have no probability, so the figures below leave them out."""
    num_outliers: int
    sum_probability: float
    probability_counts: npt.NDArray[np.int64]
    """Images by probability: see :func:`probability_histogram`."""
    cluster_sizes: npt.NDArray[np.int64]
    """(K,) images by cluster."""

    @classmethod
    def of(cls, prediction: Prediction, num_clusters: int, *, num_in_consensus: int = 0) -> Totals:
        has_cluster = prediction.cluster != NOISE
        probability_n = prediction.consensus_probability[has_cluster]
        return cls(
            num_in_consensus=num_in_consensus,
            num_noise=int((~has_cluster).sum()),
            num_outliers=int(prediction.is_outlier.sum()),
            sum_probability=float(probability_n.sum(dtype=np.float64)),
            probability_counts=probability_histogram(probability_n),
            cluster_sizes=np.bincount(prediction.cluster[has_cluster], minlength=num_clusters),
        )

    @classmethod
    def add(cls, totals: Iterable[Totals]) -> Totals:
        """The sum of at least one."""
        columns = zip(*(vars(each).values() for each in totals), strict=True)
        return cls(*(sum(column) for column in columns))

    @property
    def num_images(self) -> int:
        return int(self.cluster_sizes.sum()) + self.num_noise

    @property
    def mean_consensus_probability(self) -> float:
        return self.sum_probability / max(int(self.cluster_sizes.sum()), 1)

    def metrics(self) -> dict[str, Any]:
        return {
            "num_images": self.num_images,
            "num_in_consensus": self.num_in_consensus,
            "num_noise": self.num_noise,
            "num_outliers": self.num_outliers,
            "mean_consensus_probability": self.mean_consensus_probability,
            "num_clusters_used": int((self.cluster_sizes > 0).sum()),
            "cluster_sizes": self.cluster_sizes.tolist(),
        }

    def to_json(self) -> dict[str, Any]:
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Totals:
        arrays: dict[str, Any] = {
            key: np.array(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**arrays)


def stability_index(counts_a: npt.ArrayLike, counts_b: npt.ArrayLike) -> dict[str, float]:
    """`index` of two histograms over the same bins, and `by_chance`, its value for two samples of one population."""
    a, b = np.asarray(counts_a, dtype=np.float64), np.asarray(counts_b, dtype=np.float64)
    used = (a + b) > 0
    if a.sum() == 0 or b.sum() == 0:
        return {"index": 0.0, "by_chance": 0.0}
    p, q = a[used] + SMOOTHING, b[used] + SMOOTHING
    p, q = p / p.sum(), q / q.sum()
    by_chance = (used.sum() - 1) * (1 / a.sum() + 1 / b.sum())
    return {"index": float(((p - q) * np.log(p / q)).sum()), "by_chance": float(by_chance)}


def summarize_drift(totals: Totals, classifier: LinearClassifier) -> dict[str, Any]:
    """The summary, JSON-able: num_images, num_training_images; cluster_shares and consensus_probability (stability
    indices); mean_consensus_probability and outlier_rate (training, new); most_changed_clusters; clusters (shares of
    each); probability_histograms."""
    before_K = classifier.cluster_sizes / max(int(classifier.cluster_sizes.sum()), 1)
    now_K = totals.cluster_sizes / max(totals.num_images, 1)
    changed = np.argsort(-np.abs(now_K - before_K), kind="stable")[:NUM_MOST_CHANGED]
    return {
        "num_images": totals.num_images,
        "num_training_images": int(classifier.cluster_sizes.sum()),
        "cluster_shares": stability_index(classifier.cluster_sizes, totals.cluster_sizes),
        "consensus_probability": stability_index(classifier.holdout_probability, totals.probability_counts),
        "mean_consensus_probability": {
            "training": classifier.holdout_mean_probability,
            "new": totals.mean_consensus_probability,
        },
        "outlier_rate": {
            "training": classifier.holdout_outlier_rate,
            "new": totals.num_outliers / max(totals.num_images, 1),
        },
        "most_changed_clusters": [int(cluster) for cluster in changed],
        "clusters": [
            {"cluster": cluster, "training_share": float(before), "new_share": float(now)}
            for cluster, (before, now) in enumerate(zip(before_K, now_K, strict=True))
        ],
        "probability_histograms": {
            "training": classifier.holdout_probability.tolist(),
            "new": totals.probability_counts.tolist(),
        },
    }


def drift_lines(drift: dict[str, Any]) -> list[str]:
    """The summary as lines of text."""

    def index(name: str) -> str:
        return f"stability index {drift[name]['index']:.3f} (by chance {drift[name]['by_chance']:.3f})"

    def pair(name: str, form: str) -> str:
        return f"{drift[name]['new']:{form}} (training {drift[name]['training']:{form}})"

    return [
        f"clusters     {index('cluster_shares')}",
        f"probability  mean {pair('mean_consensus_probability', '.3f')}, {index('consensus_probability')}",
        f"outliers     {pair('outlier_rate', '.2%')}",
    ]
