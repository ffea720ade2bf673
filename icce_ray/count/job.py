"""The choice of the number of clusters on Ray: a task for each number and seed.

What a task made lies in the artifact's folder until the stage is finished: a run that was killed goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray

from icce_ray.config import Config
from icce_ray.count.choice import METRICS, Measured, search
from icce_ray.count.clustering import (
    Clustering,
    Sample,
    cluster_range,
    compare,
    draw_sample,
    make_clustering,
    seeds_of,
)
from icce_ray.embed.feature_matrix import load_features
from icce_ray.errors import DamagedArtifactError, UserError, WorkerError, describe_cause, find_cause
from icce_ray.runtime.ray_cluster import connect
from icce_ray.sample.draw import training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, Folder

MAX_RETRIES = 3
FOLDER = "clusterings"


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Choose the number of clusters: write by_count.parquet and by_seed.parquet.

    Returns:
        num_clusters, num_clusters_range (fewest and most that are as good), choice (in words), num_tried, num_images
        (looked at), and of the chosen number its stability, generalization and silhouette (means over seeds).

    Raises:
        InputError: fewer images than clusters to choose from.
        WorkerError: tasks died more often than they are retried, or a loss was not finite.
    """
    connect(config.resources)
    embed = training_set(context.inputs)
    num_images = load_features(embed).num_images
    low, high = cluster_range(config, num_images)
    folder, seeds = context.output.folder / FOLDER, seeds_of(config)
    draw = ray.remote(_draw).options(num_cpus=1, max_retries=MAX_RETRIES, name="cluster_count sample")
    make = ray.remote(_make).options(num_cpus=1, max_retries=MAX_RETRIES, name="cluster_count clustering")
    sample: list[Any] = []
    done = 0

    def measure(numbers: Sequence[int]) -> Iterator[Measured]:
        nonlocal done
        wanted = [(number, seed) for number in numbers for seed in seeds]
        there = set(folder.names())
        pending = [(number, seed) for number, seed in wanted if _name(number, seed) not in there]
        if pending and not sample:
            sample.append(draw.remote(embed, config))
        total, done = done + len(wanted), done + len(wanted) - len(pending)
        running = {make.remote(sample[0], number, seed, config, folder): number for number, seed in pending}
        context.progress.update(done, total)
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            ray.get(ready[0])
            done += 1
            context.progress.update(done, total, f"{running.pop(ready[0])} clusters")
        for number in numbers:
            yield compare(number, seeds, [_read(folder, number, seed) for seed in seeds])

    try:
        choice = search(low, high, measure)
    except ray.exceptions.RayError as error:
        known = find_cause(error, UserError) or find_cause(error, DamagedArtifactError)
        if known is not None:
            raise known from None
        raise WorkerError(
            f"cluster_count: a task failed; what is finished stays, the same command goes on. {describe_cause(error)}"
        ) from error
    by_count = choice.by_count()
    context.output.write_table("by_count.parquet", by_count)
    context.output.write_table("by_seed.parquet", choice.by_seed())
    folder.clear()
    context.progress.note(choice.sentence())
    chosen = next(row for row in by_count.to_pylist() if row["chosen"])
    return {
        "num_clusters": choice.num_clusters,
        "num_clusters_range": [choice.low, choice.high],
        "choice": choice.sentence(),
        "num_tried": len(choice.curve),
        "num_images": min(num_images, config.cluster_count.max_images),
        **{metric: chosen[metric] for metric in METRICS},
    }


def _draw(embed: Artifact, config: Config) -> Sample:
    return draw_sample(load_features(embed).matrix, config)


def _make(sample: Sample, num_clusters: int, seed: int, config: Config, folder: Folder) -> None:
    made = make_clustering(sample, num_clusters, seed, config, num_threads=1)
    folder.write_bytes(_name(num_clusters, seed), made.to_bytes())


def _read(folder: Folder, num_clusters: int, seed: int) -> Clustering:
    return Clustering.from_bytes(folder.read_bytes(_name(num_clusters, seed)))


def _name(num_clusters: int, seed: int) -> str:
    return f"{num_clusters}-{seed}.npz"
