"""The choice of the number of clusters in this process: the same clusterings, and the same answer, as job.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from icce_ray.config import Config
from icce_ray.count.choice import Choice, Measured, search
from icce_ray.count.clustering import (
    Floats,
    cluster_range,
    compare,
    draw_sample,
    make_clustering,
    seeds_of,
)
from icce_ray.runtime.progress import Progress


def count_clusters(features_ND: Floats, config: Config, *, num_threads: int, progress: Progress) -> Choice:
    """Choose the number of clusters of the rows of `features_ND`, (N, D) float16 or float32, finite.

    Raises:
        InputError: fewer rows than clusters to choose from.
        WorkerError: a loss was not finite.
    """
    low, high = cluster_range(config, len(features_ND))
    sample = draw_sample(features_ND, config)
    seeds = seeds_of(config)
    done = 0

    def measure(numbers: Sequence[int]) -> Iterator[Measured]:
        nonlocal done
        total = done + len(numbers) * len(seeds)
        for number in numbers:
            made = []
            for seed in seeds:
                progress.update(done, total, f"{number} clusters")
                made.append(make_clustering(sample, number, seed, config, num_threads))
                done += 1
            yield compare(number, seeds, made)

    return search(low, high, measure)
