"""The accuracy of the clusters, estimated without labels [ours] (docs/METHOD.md, "Estimated accuracy").

Agreement among clusterings of one method says little about the truth, because they share its mistakes. So the clusters
are compared with other kinds of clustering. The estimate is the median of three views:

- neighbours: the share of the 20 nearest images that two k-means runs, on other halves of the images, put into the same
  cluster. It follows the share of neighbours with the same label.
- Ward, and average linkage: the share of images on which that clustering and the clusters agree, matched one to one.

Shapes: n images, D dimensions, M nearest images of each, R runs.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.cluster import AgglomerativeClustering, KMeans

from icce_ray.metrics.label_free_scores import project_pca
from icce_ray.metrics.true_label_scores import clustering_accuracy
from icce_ray.neighbors.search import most_similar
from icce_ray.random_numbers import sampled_rows
from icce_ray.sample.unit_features import prepare

MAX_IMAGES = 3_000
MIN_IMAGES_PER_CLUSTER = 5
NUM_NEAREST = 20
NUM_RUNS = 8

Ints = npt.NDArray[np.integer]


def estimate_accuracy(
    features_nD: npt.NDArray[np.floating], clusters_n: Ints, *, seed: int
) -> tuple[float, dict[str, float]] | None:
    """The estimate, 0 to 1, and the three views, from a sample of at most MAX_IMAGES images that have a cluster (-1 is
    noise). Returns None for fewer than two clusters, or fewer than MIN_IMAGES_PER_CLUSTER images per cluster."""
    rows = np.flatnonzero(clusters_n >= 0)
    rows = rows[sampled_rows(len(rows), MAX_IMAGES, seed)]
    clusters = clusters_n[rows]
    num_clusters = len(np.unique(clusters))
    if num_clusters < 2 or len(rows) < max(NUM_NEAREST + 1, MIN_IMAGES_PER_CLUSTER * num_clusters):
        return None
    unit = prepare(np.asarray(features_nD[rows], dtype=np.float32), center=True)
    points = project_pca(unit[:], seed)
    _, nearest = most_similar(unit, np.arange(len(rows)), NUM_NEAREST)
    halves = half_sample_kmeans(unit[:], num_clusters, seed)
    views = {
        "neighbours": pair_precision(halves, nearest),
        "ward": _matched(clusters, points, num_clusters, linkage="ward"),
        "average_linkage": _matched(clusters, points, num_clusters, linkage="average", metric="cosine"),
    }
    return float(np.median(list(views.values()))), views


def pair_precision(labels_Rn: Ints, nearest_nM: Ints) -> float:
    """The chance that two of the R runs both put an image and one of its nearest into the same cluster."""
    num_runs = len(labels_Rn)
    together_nM = sum((labels_n[nearest_nM] == labels_n[:, None]).astype(np.int64) for labels_n in labels_Rn)
    return float((together_nM * (together_nM - 1) / (num_runs * (num_runs - 1))).mean())


def half_sample_kmeans(unit_nD: npt.NDArray[np.float32], num_clusters: int, seed: int) -> Ints:
    """Clusters of all images by NUM_RUNS k-means runs (R, n), each learnt from another half of the images."""
    rng = np.random.default_rng(seed)
    runs = []
    for run in range(NUM_RUNS):
        half = rng.permutation(len(unit_nD))[: max(num_clusters, len(unit_nD) // 2)]
        kmeans = KMeans(num_clusters, n_init=2, random_state=seed + run).fit(unit_nD[half])
        runs.append(kmeans.predict(unit_nD))
    return np.stack(runs)


def _matched(clusters: Ints, points: npt.NDArray[np.float32], num_clusters: int, **how: Any) -> float:
    return float(clustering_accuracy(clusters, AgglomerativeClustering(num_clusters, **how).fit_predict(points)))
