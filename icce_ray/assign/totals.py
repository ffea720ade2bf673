"""Totals over labelled images: each part has its own, and they add up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.classifier.linear import NOISE, Prediction, probability_histogram


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
