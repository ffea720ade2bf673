"""Small clusterings of a sample of the images with different numbers of clusters, and the measures they are compared by
(docs/METHOD.md, "Number of clusters").

All clusterings see one sample, one neighbour graph that does not depend on the number of clusters, and one space of
principal components, so they differ in their number of clusters and their seed only.

Shape letters: n images of the sample, m of those that are measured, D feature dimension, d principal components, H
heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.config import ClusterCountConfig, ConsensusConfig, HeadsConfig, NeighborsConfig
from icce_ray.consensus.best_consensus import find_consensus
from icce_ray.consensus.label_matrix import encode_heads
from icce_ray.count.choice import Choice, Measured, search
from icce_ray.count.stage import fixed_neighbors, small_heads
from icce_ray.errors import InputError, WorkerError
from icce_ray.methods.heads.fit import fit
from icce_ray.metrics.label_free_scores import generalization_score, project_pca, silhouette
from icce_ray.metrics.true_label_scores import adjusted_rand_index
from icce_ray.neighbors.graph import NeighborGraph, build_graph
from icce_ray.runtime.progress import Progress
from icce_ray.sample.training_set import sample_ids

Floats = npt.NDArray[Any]

MAX_MEASURED = 2_000
MOST_CLUSTERS, MIN_IMAGES_PER_CLUSTER = 100, 10
"""The upper end of the range if none is given."""
CONSENSUS = ConsensusConfig(methods=("vote",))


@dataclass(frozen=True)
class Sample:
    """Data that all clusterings share."""

    features_nD: Floats
    graph: NeighborGraph
    measured_m: npt.NDArray[np.int64]
    """Rows that the silhouette and the generalisation score are measured on."""
    points_md: npt.NDArray[np.float32]
    """Their principal components."""


@dataclass(frozen=True)
class Clustering:
    """The clustering of the sample with one seed."""

    heads_Hn: npt.NDArray[np.int32]
    """Cluster of each image, by each head that did not collapse."""
    num_clusters_used: int
    """Clusters of the consensus that have images."""
    generalization: float
    """Generalisation score of the consensus, 0 to 1; NaN if it is undefined."""
    silhouette: float
    """Mean over the heads, -1 to 1; NaN if it is undefined."""


def draw_sample(features_ND: Floats, max_images: int, neighbors: NeighborsConfig, seed: int) -> Sample:
    """Draw at most `max_images` of the features (N, D), and compute their graph and their principal components."""
    rows = sample_ids(len(features_ND), max_images, seed)
    features_nD = np.array(features_ND if rows is None else features_ND[rows])
    graph, _ = build_graph(features_nD, fixed_neighbors(neighbors), num_clusters=2, seed=seed)
    measured_m = sample_ids(len(features_nD), MAX_MEASURED, seed)
    if measured_m is None:
        measured_m = np.arange(len(features_nD))
    return Sample(features_nD, graph, measured_m, project_pca(features_nD[measured_m].astype(np.float32), seed))


def cluster_range(asked: ClusterCountConfig, num_images: int) -> tuple[int, int]:
    """Fewest and most clusters to choose from, for a set of `num_images`. Raises InputError: there are fewer images in
    the sample than clusters."""
    num_images = min(num_images, asked.max_images)
    most = asked.max_clusters or max(asked.min_clusters, min(MOST_CLUSTERS, num_images // MIN_IMAGES_PER_CLUSTER))
    if most > num_images:
        setting = "max_clusters" if asked.max_clusters else "min_clusters"
        raise InputError(
            f"cluster_count.{setting}: {most} clusters, but {num_images} images are looked at; lower it to at most that"
        )
    return asked.min_clusters, most


def make_clustering(sample: Sample, num_clusters: int, seed: int, heads: HeadsConfig, num_threads: int) -> Clustering:
    """Train small heads and measure them. `num_threads` does not change the result. Raises WorkerError: the loss was
    not finite."""
    try:
        trained = fit(
            sample.features_nD, sample.graph, heads, num_clusters=num_clusters, seed=seed, num_threads=num_threads
        )
    except FloatingPointError as error:
        raise WorkerError(f"cluster_count: {num_clusters} clusters, seed {seed}: {error}") from error
    heads_Hn = trained.labels_HN
    labels_n = find_consensus(encode_heads(heads_Hn), num_clusters, CONSENSUS, seed=seed).labels
    silhouettes = [silhouette(sample.points_md, labels_m) for labels_m in heads_Hn[:, sample.measured_m]]
    generalization = generalization_score(sample.points_md, labels_n[sample.measured_m], random_state=seed)
    return Clustering(
        heads_Hn=heads_Hn,
        num_clusters_used=len(np.unique(labels_n)),
        generalization=np.nan if generalization is None else generalization,
        silhouette=np.nan if None in silhouettes else float(np.mean(silhouettes)),  # type: ignore[arg-type]
    )


def compare(num_clusters: int, seeds: Sequence[int], clusterings: Sequence[Clustering]) -> Measured:
    """The measures of one number of clusters, from one clustering for each seed.

    The stability of a seed is the mean adjusted Rand index of its heads with those of the other seeds. It is adjusted
    for chance because the overlap by chance depends on the number of clusters.
    """
    size = len(clusterings)
    together = np.full((size, size), np.nan)
    for one in range(size):
        for other in range(one):
            pairs = [(a, b) for a in clusterings[one].heads_Hn for b in clusterings[other].heads_Hn]
            together[one, other] = together[other, one] = np.mean([adjusted_rand_index(a, b) for a, b in pairs])
    return Measured(
        num_clusters=num_clusters,
        seeds=tuple(seeds),
        num_clusters_used=np.array([made.num_clusters_used for made in clusterings]),
        stability=np.nanmean(together, axis=1),
        generalization=np.array([made.generalization for made in clusterings]),
        silhouette=np.array([made.silhouette for made in clusterings]),
    )


Task = tuple[int, int]
"""A clustering to be made: number of clusters, seed."""
Maker = Callable[[Sequence[Task]], Iterable[tuple[Task, Clustering]]]
"""Makes the clusterings of some tasks, in any order."""


def count_clusters(
    features_ND: Floats,
    asked: ClusterCountConfig,
    heads: HeadsConfig,
    neighbors: NeighborsConfig,
    *,
    seed: int,
    num_threads: int,
    progress: Progress,
) -> Choice:
    """Choose the number of clusters of the rows of `features_ND` in this process. Raises InputError: fewer rows than
    clusters to choose from; WorkerError: a loss was not finite.

    Args:
        features_ND: (N, D) float16 or float32, finite.
        asked, heads, neighbors: sections of the config.
        seed: seed of the sample and of the first clustering; the others follow.
    """
    heads = small_heads(heads, asked)
    cluster_range(asked, len(features_ND))  # refuses before the work starts
    sample = draw_sample(features_ND, asked.max_images, neighbors, seed)

    def make(tasks: Sequence[Task]) -> Iterator[tuple[Task, Clustering]]:
        for number, task_seed in tasks:
            yield (number, task_seed), make_clustering(sample, number, task_seed, heads, num_threads)

    return choose_number(len(features_ND), asked, make, seed=seed, progress=progress)


def choose_number(num_images: int, asked: ClusterCountConfig, make: Maker, *, seed: int, progress: Progress) -> Choice:
    """Choose the number of clusters of `num_images` from the clusterings that `make` makes. Raises InputError: fewer
    images than clusters to choose from."""
    low, high = cluster_range(asked, num_images)
    seeds = [(seed + number) % 2**31 for number in range(asked.num_seeds)]
    done = 0

    def measure(numbers: Sequence[int]) -> Iterator[Measured]:
        nonlocal done
        tasks = [(number, task_seed) for number in numbers for task_seed in seeds]
        total = done + len(tasks)
        progress.update(done, total)
        made: dict[Task, Clustering] = {}
        for task, clustering in make(tasks):
            made[task] = clustering
            done += 1
            progress.update(done, total, f"{task[0]} clusters")
        for number in numbers:
            yield compare(number, seeds, [made[number, task_seed] for task_seed in seeds])

    return search(low, high, measure)
