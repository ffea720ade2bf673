"""Figures per cluster and the images that the page shows, collected in one pass over the assignments.

Memory grows with the clusters and the images shown, not with the number of images.
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
class ShownImage:
    """An image that the page shows. They sort by certainty."""

    certainty: float
    """The lower of confidence and agreement."""
    image_id: int
    uri: str = field(compare=False)
    cluster: int = field(compare=False)
    second_choice: int = field(compare=False)


class PageContent:
    """Figures of K clusters and images to show.

    Args:
        tables: the assignments.
        num_least_certain: images to keep.
        max_outliers: images to keep.
    """

    def __init__(
        self, tables: Iterable[pa.Table], num_clusters: int, *, num_least_certain: int, max_outliers: int
    ) -> None:
        self.sizes = np.zeros(num_clusters, dtype=np.int64)
        self.num_outliers = np.zeros(num_clusters, dtype=np.int64)
        self.num_noise = 0
        """Images without a cluster, which are left out of everything else."""
        self.confidence_bins = np.zeros(NUM_BINS, dtype=np.int64)
        self.agreement_bins = np.zeros(NUM_BINS, dtype=np.int64)
        self.least_certain: list[ShownImage] = []
        """Least certain first."""
        self.outliers: list[ShownImage] = []
        """The first ones found."""
        self._confidence_sums = np.zeros(num_clusters)
        self._agreement_sums = np.zeros(num_clusters)
        self._num_agreements = np.zeros(num_clusters, dtype=np.int64)
        for table in tables:
            num_images = len(table)
            table = table.filter(pc.greater_equal(table["cluster"], 0))
            self.num_noise += num_images - len(table)
            self._count(table)
            certainty = pc.min_element_wise(table["confidence"], table["agreement"])
            table = table.append_column("certainty", certainty)
            lowest = np.lexsort((table["image_id"].to_numpy(), certainty.to_numpy()))[:num_least_certain]
            candidates = [*self.least_certain, *_shown(table.take(pa.array(lowest)))]
            self.least_certain = heapq.nsmallest(num_least_certain, candidates)
            num_missing = max_outliers - len(self.outliers)
            self.outliers += _shown(table.filter(table["is_outlier"]).slice(0, num_missing))

    def _count(self, table: pa.Table) -> None:
        def per_cluster(rows: Any, weights: npt.NDArray[np.floating] | None = None) -> npt.NDArray[Any]:
            chosen = None if weights is None else weights[rows]
            return np.bincount(clusters_n[rows], weights=chosen, minlength=len(self.sizes))

        columns = ("cluster", "confidence", "agreement", "is_outlier")
        clusters_n, confidence_n, agreement_n, outlier_n = (table[name].to_numpy() for name in columns)
        voted_n = np.isfinite(agreement_n)
        self.sizes += per_cluster(slice(None))
        self.num_outliers += per_cluster(outlier_n)
        self._confidence_sums += per_cluster(slice(None), confidence_n)
        self._agreement_sums += per_cluster(voted_n, agreement_n)
        self._num_agreements += per_cluster(voted_n)
        self.confidence_bins += np.histogram(confidence_n, NUM_BINS, (0, 1))[0]
        self.agreement_bins += np.histogram(agreement_n[voted_n], NUM_BINS, (0, 1))[0]

    def clusters(self) -> list[dict[str, Any]]:
        """A row per cluster, largest first. A mean over no images is None."""
        order = np.lexsort((np.arange(len(self.sizes)), -self.sizes))
        return [
            {
                "cluster": int(k),
                "size": int(self.sizes[k]),
                "share": float(self.sizes[k] / max(self.sizes.sum(), 1)),
                "confidence": _mean(self._confidence_sums[k], self.sizes[k]),
                "agreement": _mean(self._agreement_sums[k], self._num_agreements[k]),
                "num_outliers": int(self.num_outliers[k]),
            }
            for k in order
        ]

    def mean_agreement(self) -> float | None:
        return _mean(self._agreement_sums.sum(), self._num_agreements.sum())

    def mean_confidence(self) -> float | None:
        return _mean(self._confidence_sums.sum(), self.sizes.sum())


def _shown(table: pa.Table) -> Iterator[ShownImage]:
    columns = ["certainty", "image_id", "uri", "cluster", "second_choice"]
    return (ShownImage(**row) for row in table.select(columns).to_pylist())


def _mean(total: float, count: int) -> float | None:
    return float(total / count) if count else None
