"""The choice of the number of clusters: small clusterings with different numbers, compared (docs/METHOD.md, "Number of
clusters")."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from icce_ray.config import ClusterCountConfig, HeadsConfig, NeighborsConfig
from icce_ray.count.choice import Choice, Measured, search
from icce_ray.count.clustering import Clustering, Floats, cluster_range, compare, draw_sample, make_clustering
from icce_ray.count.settings import small_heads
from icce_ray.runtime.progress import Progress

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
