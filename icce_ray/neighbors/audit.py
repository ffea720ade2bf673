"""Audit of the features before the graph is built, without labels (docs/METHOD.md, "Automatic threshold").

A similarity means something different in every feature space: 0.3 is a good threshold for one backbone and makes all
images neighbours for another. The audit measures what each threshold would do, by comparing sampled images with all
others, and chooses one if it is `auto`.

The precision of the neighbours is estimated [ours]: two images are taken to be of one class if k-means puts them into
one cluster from two different starts. The share of neighbours for which that holds follows the share with the same
label: for lists of 60 to N/K neighbours within 5 points on CIFAR-10 and Fashion-MNIST features, centred or not, and up
to 8 points below on digits. A single run overestimates the precision if classes overlap (by 10 points on CIFAR-10),
because its borders lie where neighbours are few; two runs disagree there. The estimate cannot tell which clusters are
wanted: raw pixels of photos cluster well by something other than their labels.

Legend: N images, D feature dimension, K clusters, R k-means runs, P pairs, Q sampled queries, B columns at a time, T
thresholds, C = R + 1 numbers of runs that agree, k list length.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from icce_ray.config import NeighborsConfig
from icce_ray.neighbors.adaptive_rule import Rule
from icce_ray.neighbors.search import QUERY_BLOCK, most_similar, shard_bytes, worker_bytes
from icce_ray.runtime.threads import in_threads, threads_within
from icce_ray.sample.unit_features import Floats, Ids, UnitFeatures

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
NUM_RUNS = 8
NUM_ITERATIONS = 15
MIN_TRAINING_IMAGES = 20_000
TRAINING_IMAGES_PER_CLUSTER = 64
LABEL_BLOCK = 4096
AGREEMENT_WEIGHTS = np.array([c * (c - 1) / (NUM_RUNS * (NUM_RUNS - 1)) for c in range(NUM_RUNS + 1)])
"""Share of pairs of runs that both put two images into one cluster, by the number of runs that do."""
FINEST_STEP = 1e-5
"""Smallest step between two thresholds."""
BLOCK_CELL_BYTES = 32
"""Memory per pair while it is counted."""


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


def cluster_labels(unit: UnitFeatures, num_clusters: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """Labels from `NUM_RUNS` independent spherical k-means runs with K clusters, at most N: (R, N) int32. Each run
    learns its centroids from a random sample of the images, which bounds the time at any N."""
    num_images = len(unit)
    num_clusters = min(num_clusters, num_images)
    num_training = min(num_images, max(MIN_TRAINING_IMAGES, TRAINING_IMAGES_PER_CLUSTER * num_clusters))
    draws = [
        (np.sort(rng.choice(num_images, num_training, replace=False)), int(rng.integers(2**31)))
        for _ in range(NUM_RUNS)
    ]

    def centroids_of(draw: tuple[Ids, int]) -> Floats:
        sample, seed = draw
        return spherical_kmeans(unit[sample], num_clusters, seed, NUM_ITERATIONS)

    # Each run uses one thread, so that its sums do not depend on the machine. The runs share the cores instead.
    dim = unit.shape[1]
    centroids_RKD = in_threads(centroids_of, draws, threads_within(4 * num_training * dim))
    labels_RN = np.empty((NUM_RUNS, num_images), np.int32)

    def label(start: int) -> None:
        block_BD = unit[start : start + LABEL_BLOCK]
        for run, centroids_KD in enumerate(centroids_RKD):
            labels_RN[run, start : start + len(block_BD)] = (block_BD @ centroids_KD.T).argmax(axis=1)

    in_threads(label, range(0, num_images, LABEL_BLOCK), threads_within(LABEL_BLOCK * (20 * dim + 4 * num_clusters)))
    return labels_RN


def times_together(labels_RA: npt.NDArray[np.int32], labels_RB: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Number of runs in which each image of A shares its cluster with each image of B, (A, B) uint8."""
    count_AB = np.zeros((labels_RA.shape[1], labels_RB.shape[1]), np.uint8)
    for labels_A, labels_B in zip(labels_RA, labels_RB, strict=True):
        count_AB += labels_A[:, None] == labels_B[None, :]
    return count_AB


def spherical_kmeans(points_MD: Floats, num_clusters: int, seed: int, num_iterations: int) -> Floats:
    """Centroids of unit length, (K, D) float32. They do not depend on the number of threads."""
    # One thread, since the sums, and with them the threshold, must not depend on the machine.
    num_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(
            points_MD.shape[1],
            num_clusters,
            niter=num_iterations,
            seed=seed,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=2**31 - 1,
        )
        kmeans.train(np.ascontiguousarray(points_MD))
    finally:
        faiss.omp_set_num_threads(num_threads)
    assert kmeans.centroids is not None
    return kmeans.centroids


@dataclass(frozen=True)
class Curves:
    """Figures for each threshold, measured on sampled rows.

    thresholds: (T,) ascending.
    mean_above: (T,) mean number of images above the threshold; mean_neighbors: (T,) after the limits of the rule.
    share_at_min: (T,) share of rows with fewer than `min_neighbors` images above the threshold.
    precision: (T,) estimated precision; precision_at_min: that of the `min_neighbors` most similar.
    """

    thresholds: npt.NDArray[np.float64]
    mean_above: npt.NDArray[np.float64]
    mean_neighbors: npt.NDArray[np.float64]
    share_at_min: npt.NDArray[np.float64]
    precision: npt.NDArray[np.float64]
    precision_at_min: float


def count_pairs(
    unit: UnitFeatures, queries_Q: Ids, labels_RN: npt.NDArray[np.int32], thresholds_T: npt.NDArray[np.float64]
) -> Ids:
    """Compare the query images with all others and count the pairs between each threshold and the next, by the number
    of k-means runs that put both images into one cluster: (Q, T, R + 1). Thresholds are ascending multiples of
    `FINEST_STEP`."""
    shape = (len(queries_Q), len(thresholds_T) + 1, NUM_RUNS + 1)
    first_Q1 = (np.arange(len(queries_Q)) * shape[1] * shape[2])[:, None]
    steps_per_unit = round(1 / FINEST_STEP)
    bin_middles = -1.0 + (np.arange(2 * steps_per_unit + 1) + 0.5) * FINEST_STEP
    bin_of_step = (np.searchsorted(thresholds_T, bin_middles, side="right") * shape[2]).astype(np.int32)
    queries_QD, labels_RQ = unit[queries_Q], labels_RN[:, queries_Q]

    def cell(cosine: Floats, together: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
        step = ((cosine.clip(-1.0, 1.0) + 1.0) * steps_per_unit).astype(np.int32)
        cells: npt.NDArray[np.int32] = bin_of_step[step] + together
        return cells

    def count(starts: range) -> Ids:
        counts = np.zeros(np.prod(shape), np.int64)
        for start in starts:
            block = slice(start, start + QUERY_BLOCK)
            cells_QB = cell(queries_QD @ unit[block].T, times_together(labels_RQ, labels_RN[:, block]))
            counts += np.bincount((cells_QB + first_Q1).ravel(), minlength=len(counts))
        return counts

    num_threads = threads_within(8 * int(np.prod(shape)) + BLOCK_CELL_BYTES * len(queries_Q) * QUERY_BLOCK)
    starts = range(0, len(unit), QUERY_BLOCK)
    counts: Ids = np.sum(in_threads(count, [starts[n::num_threads] for n in range(num_threads)], num_threads), axis=0)
    own_Q = np.einsum("qd,qd->q", queries_QD, queries_QD)
    np.subtract.at(counts, first_Q1[:, 0] + cell(own_Q, np.full(len(queries_Q), NUM_RUNS, np.uint8)), 1)
    return counts.reshape(shape)[:, 1:]


def curves_of(
    thresholds_T: npt.NDArray[np.float64], counts_QTC: Ids, together_Qk: npt.NDArray[Any], max_neighbors: int | None
) -> Curves:
    """The figures for each threshold, from the counts of :func:`count_pairs` and the number of k-means runs in which
    each of a query's `min_neighbors` most similar shares its cluster (Q, k)."""
    floor = together_Qk.shape[1]
    weight_Q = np.full(len(counts_QTC), 1.0 / len(counts_QTC))
    # Pairs above each threshold: cumulative sums from the last one down.
    above_QT, pure_QT = (
        np.ascontiguousarray(values_QT[:, ::-1].cumsum(axis=1)[:, ::-1], np.float64)
        for values_QT in (counts_QTC.sum(axis=2), counts_QTC @ AGREEMENT_WEIGHTS)
    )
    nearest_precision_Q = AGREEMENT_WEIGHTS[together_Qk].mean(axis=1)
    at_min_QT = above_QT < floor
    precision_QT = np.where(at_min_QT, nearest_precision_Q[:, None], pure_QT / np.maximum(above_QT, 1))
    lengths_QT = np.maximum(above_QT, floor)
    if max_neighbors is not None:
        lengths_QT = np.minimum(lengths_QT, max_neighbors)
    return Curves(
        thresholds_T,
        weight_Q @ above_QT,
        weight_Q @ lengths_QT,
        weight_Q @ at_min_QT,
        weight_Q @ precision_QT,
        float(weight_Q @ nearest_precision_Q),
    )
