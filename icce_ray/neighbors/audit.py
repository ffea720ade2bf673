"""Audit of the features before the graph is built, without labels (docs/METHOD.md, "Automatic threshold").

A similarity means something different in every feature space: 0.3 is a good threshold for one backbone and makes all
images neighbours for another. The audit measures what each threshold would do, by comparing sampled images with all
others, and chooses one if it is `auto`.

Legend: N images, D feature dimension, K clusters, P pairs, T thresholds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from icce_ray.config import NeighborsConfig
from icce_ray.neighbors.adaptive_rule import Rule
from icce_ray.neighbors.neighbor_precision import (
    FINEST_STEP,
    Curves,
    cluster_labels,
    count_pairs,
    curves_of,
)
from icce_ray.neighbors.search import most_similar, shard_bytes, worker_bytes
from icce_ray.sample.unit_features import Floats, UnitFeatures

STREAM = 2
"""Second part of the seed, which makes the audit's draws independent of those of other stages."""
NUM_RANDOM_PAIRS = 1_000_000
NUM_HISTOGRAM_BINS = 200
MAX_QUERIES = 2000
MIN_QUERIES = 256
MAX_PAIRS = 500_000_000
MIN_THRESHOLDS = 150
MAX_CLASS_SHARE = 0.7
"""Mean length of automatic lists, at most, as a share of N / K. Longer lists reach into other classes [ours]."""
MIN_KEPT_PRECISION = 0.99
"""Share of the precision above chance (1/K) of the `min_neighbors` most similar that automatic lists keep. Longer lists
made single heads no better and the consensus worse: digits 85.8% at 45 neighbours, 83.1% at 92, 81% at 126; two classes
of Fashion-MNIST 98.0% at 150 and 97.2% at 600 [ours]. It is a share because the precision of the nearest depends on the
features, and because errors of the estimate cancel."""
SHORT_CLASS_SHARE = 0.1
MIN_KEPT_PRECISION_OF_SHORT = 0.85
"""The same for lists of up to `SHORT_CLASS_SHARE` of N / K, which may lose more precision because a few neighbours show
too little of a large class. On two sets of CIFAR-10 features (N / K = 1,000), lists of 100 instead of 30 kept 92% and
90% of the precision above chance. Single heads, each on half of the dimensions, gained 1.0 and 1.9 points and the
consensus 0.1 and 2.8 [ours]."""


@dataclass(frozen=True)
class Audit:
    """Result of the audit.

    num_images, dim: N, D.
    similarity_threshold: threshold to build the graph with; None for exactly `min_neighbors` per image.
    is_automatic: whether the audit chose the threshold; reason: why this one, in words.
    mean_neighbors: expected mean length of the graph's rows; estimated_precision: expected share of neighbours that
        belong to the image's cluster.
    num_queries: number of images that were compared with all others to get these expectations.
    bin_edges, random_pairs, nearest_pairs: histograms of the cosine of random pairs and of the `min_neighbors` most
        similar pairs.
    thresholds: for each threshold mean_neighbors, share_at_min (rows with fewer than `min_neighbors` above the
        threshold) and estimated_precision.
    base_bytes, worker_bytes, graph_bytes: memory for the features of all shards together, further memory per worker,
        and size of the graph on storage. predicted_s: seconds of the search in one process, from the audit's speed.
    """

    num_images: int
    dim: int
    similarity_threshold: float | None
    is_automatic: bool
    reason: str
    mean_neighbors: float
    estimated_precision: float
    num_queries: int
    bin_edges: list[float]
    random_pairs: list[int]
    nearest_pairs: list[int]
    thresholds: list[dict[str, float]]
    base_bytes: int
    worker_bytes: int
    graph_bytes: int
    predicted_s: float

    def rule(self, config: NeighborsConfig, seed: int) -> Rule:
        """The adaptive rule for the graph; `seed` draws the subsets of long lists."""
        min_neighbors = min(config.min_neighbors, self.num_images - 1)
        return Rule(self.similarity_threshold, min_neighbors, config.max_neighbors, seed)


def audit_features(unit: UnitFeatures, config: NeighborsConfig, *, num_clusters: int, seed: int) -> Audit:
    """Measure similarities and what each threshold would do, and choose the threshold if it is `auto`."""
    num_images, dim = unit.shape
    rng = np.random.default_rng([seed, STREAM])
    floor = min(config.min_neighbors, num_images - 1)
    random_P = _random_similarities(unit, rng)
    num_queries = min(num_images, MAX_QUERIES, max(MIN_QUERIES, MAX_PAIRS // num_images))
    queries_Q = np.sort(rng.choice(num_images, num_queries, replace=False))
    started = time.perf_counter()
    nearest_Qk, nearest_ids_Qk = most_similar(unit, queries_Q, floor)
    search_s = time.perf_counter() - started
    labels_RN = cluster_labels(unit, num_clusters, rng)
    share_of_interest = min(1.0, max(1.5 / num_clusters, 2.0 * floor / num_images))
    thresholds_T = _candidate_thresholds(float(np.quantile(random_P, 1.0 - share_of_interest)))
    counts_QTC = count_pairs(unit, queries_Q, labels_RN, thresholds_T)
    is_together_RQk = labels_RN[:, queries_Q, None] == labels_RN[:, nearest_ids_Qk]
    together_Qk = is_together_RQk.sum(axis=0, dtype=np.uint8)
    curves = curves_of(thresholds_T, counts_QTC, together_Qk, config.max_neighbors)
    threshold: float | None
    if config.similarity_threshold == "auto":
        threshold, reason = choose_threshold(curves, floor, config.max_neighbors, num_images, num_clusters)
    else:
        threshold, reason = config.similarity_threshold, "given"
    mean_neighbors, precision = float(floor), curves.precision_at_min
    if threshold is not None:
        t = max(0, int(np.searchsorted(thresholds_T, threshold + FINEST_STEP / 2)) - 1)
        mean_neighbors, precision = float(curves.mean_neighbors[t]), float(curves.precision[t])
    index_bytes = 4 if num_images <= 2**31 - 1 else 8
    edges = np.linspace(-1.0, 1.0, NUM_HISTOGRAM_BINS + 1).round(6)
    return Audit(
        num_images=num_images,
        dim=dim,
        similarity_threshold=threshold,
        is_automatic=config.similarity_threshold == "auto",
        reason=reason,
        mean_neighbors=round(mean_neighbors, 2),
        estimated_precision=round(precision, 4),
        num_queries=num_queries,
        bin_edges=edges.tolist(),
        random_pairs=np.histogram(random_P.clip(-1, 1), edges)[0].tolist(),
        nearest_pairs=np.histogram(nearest_Qk.clip(-1, 1), edges)[0].tolist(),
        thresholds=[
            {
                "threshold": float(thresholds_T[t]),
                "mean_neighbors": round(float(curves.mean_neighbors[t]), 2),
                "share_at_min": round(float(curves.share_at_min[t]), 4),
                "estimated_precision": round(float(curves.precision[t]), 4),
            }
            for t in range(len(thresholds_T))
        ],
        base_bytes=shard_bytes(num_images, dim),
        worker_bytes=worker_bytes(num_images, dim, mean_neighbors),
        graph_bytes=int(num_images * (mean_neighbors * index_bytes + 8)),
        predicted_s=round(search_s / num_queries * num_images, 1),
    )


def choose_threshold(
    curves: Curves, floor: int, max_neighbors: int | None, num_images: float, num_clusters: int
) -> tuple[float, str]:
    """The lowest threshold, which gives the most neighbours, whose lists are neither too long nor too impure. How much
    impurity is allowed depends on their length. `floor` is `min_neighbors`, at most N - 1. Returns the threshold, and
    the limit that determined it, in words."""
    class_size = num_images / num_clusters
    long = max(float(floor), MAX_CLASS_SHARE * class_size)
    short = max(float(floor), min(SHORT_CLASS_SHARE * class_size, max_neighbors or np.inf))
    chance = 1.0 / num_clusters
    limits: dict[int, str] = {}
    for longest, kept in ((long, MIN_KEPT_PRECISION), (short, MIN_KEPT_PRECISION_OF_SHORT)):
        least_precision = chance + kept * max(curves.precision_at_min - chance, 0.0)
        is_pure_T = curves.precision >= least_precision
        good_T = (curves.mean_above <= longest) & is_pure_T
        if good_T.any():
            t = int(np.argmax(good_T))
            by_precision = f"an estimated precision of {least_precision:.1%}"
            limits[t] = f"{longest:,.0f} neighbours on average" if is_pure_T[max(t - 1, 0)] else by_precision
    if limits:
        t = min(limits)
        return float(curves.thresholds[t]), f"the longest lists within {limits[t]}"
    t = int(np.argmax(curves.mean_above <= floor)) if (curves.mean_above <= floor).any() else -1
    reason = "even the nearest are no better than chance: about min_neighbors above the threshold"
    return float(curves.thresholds[t]), reason


def _random_similarities(unit: UnitFeatures, rng: np.random.Generator) -> Floats:
    """Cosines of about `NUM_RANDOM_PAIRS` pairs of different images."""
    size = min(len(unit), round(NUM_RANDOM_PAIRS**0.5))
    rows, columns = (rng.choice(len(unit), size, replace=False) for _ in range(2))
    cosine = unit[rows] @ unit[columns].T
    pairs: Floats = cosine[rows[:, None] != columns[None, :]]
    return pairs


def _candidate_thresholds(lowest_of_interest: float) -> npt.NDArray[np.float64]:
    """Tenths, and above `lowest_of_interest` steps of 1, 2 or 5 times a power of ten, at least `MIN_THRESHOLDS`."""
    wanted = max((1.0 - lowest_of_interest) / MIN_THRESHOLDS, FINEST_STEP)
    power = 10.0 ** np.floor(np.log10(wanted) + 1e-9)
    step = power * max(factor for factor in (1, 2, 5) if factor * power <= wanted * (1 + 1e-9))
    fine = np.arange(np.floor(lowest_of_interest / step), round(1.0 / step)) * step
    return np.unique(np.concatenate([np.arange(-9, 10) / 10, fine]).round(6))
