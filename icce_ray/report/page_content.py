"""What the page says about the clusters, gathered in one pass over the parts of the assignments.

Memory grows with the clusters and with what is shown, not with the number of images.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

NUM_BINS = 25


@dataclass(frozen=True, order=True)
class Shown:
    """An image that the page shows."""

    certainty: float
    """The lower of confidence and agreement."""
    image_id: int
    uri: str = field(compare=False)
    cluster: int = field(compare=False)
    second_choice: int = field(compare=False)
    confidence: float = field(compare=False)
    agreement: float | None = field(compare=False)


@dataclass
class Content:
    """Figures by cluster (arrays of K) and the images to show."""

    sizes: npt.NDArray[np.int64]
    confidence_sums: npt.NDArray[np.float64]
    agreement_sums: npt.NDArray[np.float64]
    num_agreements: npt.NDArray[np.int64]
    num_outliers: npt.NDArray[np.int64]
    confidence_bins: npt.NDArray[np.int64]
    agreement_bins: npt.NDArray[np.int64]
    exemplars: dict[int, list[Shown]] = field(default_factory=dict)
    """Most certain first."""
    least_certain: list[Shown] = field(default_factory=list)
    """Least certain first."""
    outliers: list[Shown] = field(default_factory=list)
    """The first found."""

    def clusters(self) -> list[dict[str, Any]]:
        """A row per cluster, largest first; means are None where there is nothing to average."""
        order = np.lexsort((np.arange(len(self.sizes)), -self.sizes))
        return [
            {
                "cluster": int(k),
                "size": int(self.sizes[k]),
                "share": float(self.sizes[k] / max(self.sizes.sum(), 1)),
                "confidence": _mean(self.confidence_sums[k], self.sizes[k]),
                "agreement": _mean(self.agreement_sums[k], self.num_agreements[k]),
                "num_outliers": int(self.num_outliers[k]),
            }
            for k in order
        ]

    def mean_agreement(self) -> float | None:
        return _mean(self.agreement_sums.sum(), self.num_agreements.sum())

    def mean_confidence(self) -> float | None:
        return _mean(self.confidence_sums.sum(), self.sizes.sum())


def gather(tables: Iterable[pa.Table], num_clusters: int, *, num_least_certain: int, max_outliers: int) -> Content:
    """Go through the assignments.

    Args:
        tables: with the columns of the assignments.
        num_clusters: K.
        num_least_certain: images to keep.
        max_outliers: images to keep.
    """
    content = Content(
        sizes=np.zeros(num_clusters, dtype=np.int64),
        confidence_sums=np.zeros(num_clusters),
        agreement_sums=np.zeros(num_clusters),
        num_agreements=np.zeros(num_clusters, dtype=np.int64),
        num_outliers=np.zeros(num_clusters, dtype=np.int64),
        confidence_bins=np.zeros(NUM_BINS, dtype=np.int64),
        agreement_bins=np.zeros(NUM_BINS, dtype=np.int64),
    )
    for table in tables:
        clusters_n = table["cluster"].to_numpy()
        confidence_n = table["confidence"].to_numpy()
        agreement_n = table["agreement"].to_numpy()
        voted = np.isfinite(agreement_n)
        outlier = table["is_outlier"].to_numpy()
        content.sizes += np.bincount(clusters_n, minlength=num_clusters)
        content.confidence_sums += np.bincount(clusters_n, weights=confidence_n, minlength=num_clusters)
        content.agreement_sums += np.bincount(clusters_n[voted], weights=agreement_n[voted], minlength=num_clusters)
        content.num_agreements += np.bincount(clusters_n[voted], minlength=num_clusters)
        content.num_outliers += np.bincount(clusters_n[outlier], minlength=num_clusters)
        content.confidence_bins += np.histogram(confidence_n, NUM_BINS, (0, 1))[0]
        content.agreement_bins += np.histogram(agreement_n[voted], NUM_BINS, (0, 1))[0]
        certainty_n = np.where(voted, np.minimum(confidence_n, agreement_n), confidence_n)
        for image in _shown(table.filter(table["is_exemplar"])):
            content.exemplars.setdefault(image.cluster, []).append(image)
        lowest = np.lexsort((table["image_id"].to_numpy(), certainty_n))[:num_least_certain]
        candidates = [*content.least_certain, *_shown(table.take(pa.array(lowest)))]
        content.least_certain = heapq.nsmallest(num_least_certain, candidates)
        room = max_outliers - len(content.outliers)
        if room > 0:
            content.outliers += _shown(table.filter(table["is_outlier"]).slice(0, room))
    for images in content.exemplars.values():
        images.sort(key=lambda image: (-image.certainty, image.image_id))
    return content


def _shown(table: pa.Table) -> Iterator[Shown]:
    certainty = pc.min_element_wise(table["confidence"], table["agreement"])
    for row, certain in zip(table.to_pylist(), certainty.to_pylist(), strict=True):
        kept = {key: row[key] for key in ("image_id", "uri", "cluster", "second_choice", "confidence", "agreement")}
        yield Shown(certainty=certain, **kept)


def _mean(total: float, count: int) -> float | None:
    return float(total / count) if count else None
