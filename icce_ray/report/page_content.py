"""Figures per cluster and the images that the page shows, collected in one pass over the assignments.

Memory grows with the clusters and the images shown, not with the number of images.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from icce_ray.assign.part_labeler import SCHEMA
from icce_ray.random_numbers import splitmix64

NOISE = -1
NUM_BINS = 25
NUM_LISTED = 200
"""Length of the lists of least certain images and of outliers."""

Keys = npt.NDArray[np.uint64]


def images_per_cluster(sizes_K: npt.NDArray[np.integer], max_images: int) -> int:
    """The largest m, at least 1, such that m images of each cluster (fewer where it is smaller) are at most
    `max_images` in all."""
    rising = np.sort(np.asarray(sizes_K, dtype=np.int64))
    left, num_clusters = max_images, len(rising)
    for done, size in enumerate(rising.tolist()):
        if size * (num_clusters - done) > left:
            return max(1, left // (num_clusters - done))
        left -= size
    return max(1, int(rising[-1]))


class PageContent:
    """Figures of K clusters, and the images to show, from the assignments.

    Of each cluster, and of the noise, at most `per_cluster` images are shown: uniform draws, first among those that
    took part in the consensus. Added to these are the images in `wanted_ids` (ascending), the least certain images and
    the farthest outliers.
    """

    def __init__(
        self, tables: Iterable[pa.Table], num_clusters: int, per_cluster: int, wanted_ids: npt.NDArray[np.int64]
    ) -> None:
        self.sizes = np.zeros(num_clusters, dtype=np.int64)
        self.num_outliers = np.zeros(num_clusters, dtype=np.int64)
        self.num_noise = 0
        """Images without a cluster. They are shown, and left out of everything else."""
        self.probability_bins = np.zeros(NUM_BINS, dtype=np.int64)
        self.agreement_bins = np.zeros(NUM_BINS, dtype=np.int64)
        self.least_certain: list[int] = []
        """Ids of the images with the lowest agreement, then the lowest consensus probability."""
        self.outliers: list[int] = []
        """Ids of the outliers, farthest first."""
        self._probability_sums = np.zeros(num_clusters)
        self._agreement_sums = np.zeros(num_clusters)
        self._num_agreements = np.zeros(num_clusters, dtype=np.int64)
        self._confused: dict[tuple[int, int], float] = {}
        drawn = wanted = uncertain = outlying = SCHEMA.empty_table()
        for table in tables:
            drawn = _lowest_of_each_cluster(pa.concat_tables([drawn, table]), per_cluster)
            is_wanted = np.isin(table["image_id"].to_numpy(), wanted_ids)
            wanted = pa.concat_tables([wanted, table.filter(pa.array(is_wanted))])
            num_images = len(table)
            table = table.filter(pc.greater_equal(table["cluster"], 0))
            self.num_noise += num_images - len(table)
            self._count(table)
            uncertain = pa.concat_tables([uncertain, table])
            order = np.lexsort([uncertain[name].to_numpy() for name in ("image_id", "consensus_probability")])
            agreement_n = uncertain["agreement"].to_numpy()[order]  # null as NaN, which sorts last
            uncertain = uncertain.take(pa.array(order[np.argsort(agreement_n, kind="stable")[:NUM_LISTED]]))
            outlying = pa.concat_tables([outlying, table.filter(table["is_outlier"])])
            order = np.lexsort([outlying["image_id"].to_numpy(), -outlying["outlier_score"].to_numpy()])
            outlying = outlying.take(pa.array(order[:NUM_LISTED]))
        self.least_certain = uncertain["image_id"].to_pylist()
        self.outliers = outlying["image_id"].to_pylist()
        shown = pa.concat_tables([drawn, wanted, uncertain, outlying])
        first = np.unique(shown["image_id"].to_numpy(), return_index=True)[1]
        self.shown: pa.Table = shown.take(pa.array(first))
        """The images to show, with the columns of the assignments, by ascending id."""

    def _count(self, table: pa.Table) -> None:
        def per_cluster(rows: Any, weights: npt.NDArray[np.floating] | None = None) -> npt.NDArray[Any]:
            chosen = None if weights is None else weights[rows]
            return np.bincount(clusters_n[rows], weights=chosen, minlength=len(self.sizes))

        columns = ("cluster", "consensus_probability", "agreement", "is_outlier", "second_choice")
        clusters_n, probability_n, agreement_n, outlier_n, second_n = (table[name].to_numpy() for name in columns)
        voted_n = np.isfinite(agreement_n)
        self.sizes += per_cluster(slice(None))
        self.num_outliers += per_cluster(outlier_n)
        self._probability_sums += per_cluster(slice(None), probability_n)
        self._agreement_sums += per_cluster(voted_n, agreement_n)
        self._num_agreements += per_cluster(voted_n)
        self.probability_bins += np.histogram(probability_n, NUM_BINS, (0, 1))[0]
        self.agreement_bins += np.histogram(agreement_n[voted_n], NUM_BINS, (0, 1))[0]
        doubt_n = 1.0 - np.where(voted_n, agreement_n, probability_n)
        doubted = np.flatnonzero((doubt_n > 0) & (second_n >= 0))
        pairs_n = clusters_n[doubted].astype(np.int64) * len(self.sizes) + second_n[doubted]
        pairs, place_n = np.unique(pairs_n, return_inverse=True)
        for pair, doubt in zip(pairs.tolist(), np.bincount(place_n, weights=doubt_n[doubted]).tolist(), strict=True):
            key = divmod(pair, len(self.sizes))
            self._confused[key] = self._confused.get(key, 0.0) + doubt

    def clusters(self) -> list[dict[str, Any]]:
        """A row per cluster, largest first. A mean over no images is None."""
        order = np.lexsort((np.arange(len(self.sizes)), -self.sizes))
        return [
            {
                "cluster": int(k),
                "size": int(self.sizes[k]),
                "share": float(self.sizes[k] / max(self.sizes.sum(), 1)),
                "agreement": _mean(self._agreement_sums[k], self._num_agreements[k]),
                "consensus_probability": _mean(self._probability_sums[k], self.sizes[k]),
                "num_outliers": int(self.num_outliers[k]),
            }
            for k in order
        ]

    def confusion(self, num_pairs: int) -> list[list[float]]:
        """(cluster, other cluster, share): the votes in a cluster that went to another, as a share of its images. A
        vote against an image's cluster counts for its second choice. The `num_pairs` pairs with the most votes."""
        most = sorted(self._confused.items(), key=lambda item: (-item[1], item[0]))[:num_pairs]
        return [[cluster, other, votes / int(self.sizes[cluster])] for (cluster, other), votes in most]

    def mean_agreement(self) -> float | None:
        return _mean(self._agreement_sums.sum(), self._num_agreements.sum())

    def mean_consensus_probability(self) -> float | None:
        return _mean(self._probability_sums.sum(), self.sizes.sum())


def _lowest_of_each_cluster(table: pa.Table, num_images: int) -> pa.Table:
    """The `num_images` rows of each cluster with the lowest keys."""
    key_n = _keys(table)
    cluster_n = table["cluster"].to_numpy()
    order = np.lexsort((key_n, cluster_n))
    firsts = np.flatnonzero(np.diff(cluster_n[order], prepend=NOISE - 1))
    rank_n = np.arange(len(order)) - np.repeat(firsts, np.diff(np.append(firsts, len(order))))
    return table.take(pa.array(order[rank_n < num_images]))


def _keys(table: pa.Table) -> Keys:
    """A uniform number for each image that depends on its id only; larger for images outside the consensus."""
    key_n: Keys = splitmix64(table["image_id"].to_numpy().astype(np.uint64)) >> np.uint64(1)
    outside_n = pc.is_null(table["agreement"]).to_numpy()
    return np.where(outside_n, key_n | np.uint64(1 << 63), key_n)


def _mean(total: float, count: int) -> float | None:
    return float(total / count) if count else None
