"""K-means on Ray: the images are divided over shard actors, which stay for all iterations.

In each iteration every shard gets the centroids and returns its sums: ``12 K d`` bytes a shard, whatever the number of
images. An actor that dies is started again, prepares its rows again, and repeats what it was asked. A killed run
resumes with the starts that are finished, and from the last checkpoint of those under way.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import cycle
from typing import Any

from icce_ray.config import Config, KMeansConfig, WorkerResources
from icce_ray.embed.feature_matrix import load_features
from icce_ray.methods import METHODS
from icce_ray.methods.kmeans.fit_kmeans import Shards, fit_kmeans
from icce_ray.methods.kmeans.kmeans_shard import BLOCK_ELEMENTS, KMeansShard, sample_size
from icce_ray.methods.kmeans.projection import ELEMENTS_AT_A_TIME, MAX_PRODUCTS, Features
from icce_ray.runtime.cluster_resources import memory_of_machines, wait_for_machines, worker_threads
from icce_ray.runtime.machine import available_memory_bytes, require_memory
from icce_ray.runtime.ray_cluster import connect, runs_here, threads_here
from icce_ray.runtime.workers import start_actors, stop_actors, translated_errors
from icce_ray.sample.training_set import source_digest, training_set
from icce_ray.stage import StageContext
from icce_ray.store.part_records import PartRecords

STARTS_FOLDER = "starts"


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Cluster the images: label_matrix.npy (a row for each start), clusterings.json (inertias as losses) and kmeans.npz
    (centroids and projection). The number of workers does not change the result.

    Returns num_starts, best_start, inertia (of that start), highest_inertia, num_iterations, converged, num_components.
    Raises InputError: features that are not finite; ResourceError: a machine lacks the memory or the disk; the message
    says how much is needed; WorkerError: a worker died more often than it is restarted.
    """
    embed = training_set(context.inputs)
    features = load_features(embed)
    num_images, dim = features.num_images, features.dim
    folder = context.output.folder / STARTS_FOLDER

    def load() -> Features:
        return load_features(embed).matrix

    records = PartRecords(folder, source_digest(embed, METHODS["kmeans"].version))
    with ExitStack() as stack:
        if runs_here(config.resources, num_images):
            num_threads, machines = threads_here(), [(1, available_memory_bytes())]
            shards = Shards([KMeansShard(load, num_threads=num_threads, on_disk=True)])
        else:
            connect(config.resources)
            wait_for_machines(config.resources, "method", context.progress.note)
            num_threads, shards = worker_threads(config.resources.method), ShardActors(load, config.resources.method)
            stack.callback(stop_actors, shards.shards)
            machines = memory_of_machines(shards.shards)
        _check_memory(config, num_images, dim, len(shards.shards), machines, num_threads)
        fitted = fit_kmeans(
            shards, config.kmeans, num_images=num_images, dim=dim, num_clusters=config.num_clusters, seed=config.seed,
            progress=context.progress, records=records,
        )  # fmt: skip
    fitted.clusterings(num_images).write(context.output)
    folder.clear()
    return fitted.metrics()


class ShardActors(Shards):
    """The shards as actors."""

    def __init__(self, load: Any, workers: WorkerResources) -> None:
        device, num_shards = "cuda" if workers.gpus_per_worker else None, workers.num_workers
        rest = num_shards, worker_threads(workers), device, True
        super().__init__(start_actors(KMeansShard, workers, [(load, shard, *rest) for shard in range(num_shards)]))

    def all(self, method: str, *arguments: Any) -> list[Any]:
        import ray

        with translated_errors("kmeans"):
            references = [ray.put(argument) for argument in arguments]
            return ray.get([getattr(actor, method).remote(*references) for actor in self.shards])

    def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        import ray

        with translated_errors("kmeans"):
            calls = zip(cycle(self.shards), arguments, strict=False)
            return ray.get([getattr(actor, method).remote(*each) for actor, each in calls])


def _check_memory(
    config: Config, num_images: int, dim: int, num_workers: int, machines: list[tuple[int, int]], num_threads: int
) -> None:
    """Refuse before the work starts, with what a machine needs. The driver may be on any of them."""
    here = driver_bytes(config.kmeans, num_images, dim, config.num_clusters, num_workers)
    each = worker_bytes(config.kmeans, num_images, dim, config.num_clusters, num_threads)
    for count, available in machines:
        require_memory(
            here + count * each,
            available,
            f"kmeans: {num_images:,} images x {dim} dimensions, {config.num_clusters:,} clusters and "
            f"{config.kmeans.num_starts} starts",
            "Lower kmeans.num_starts, resources.method.num_workers or sample.max_images, or use machines with more "
            "memory",
            f" on a machine with {count} of {num_workers} workers",
        )


def worker_bytes(settings: KMeansConfig, num_images: int, dim: int, num_clusters: int, num_threads: int) -> int:
    """``8 K d`` sums for each thread, 24 bytes for each number of a block, ``12 K d`` centroids, ``16 d`` for each row
    of the sample, ``8 D D`` covariance sums of each part; with mini-batches ``8 N`` for the order of the images."""
    d = settings.num_components or dim
    cells = num_clusters * d
    products = 0 if settings.num_components is None else 8 * min(MAX_PRODUCTS, 256 * dim**2)
    order = 8 * num_images if settings.algorithm == "mini_batch" else 0
    blocks = num_threads * (8 * cells + 24 * max(BLOCK_ELEMENTS, ELEMENTS_AT_A_TIME))
    return blocks + 12 * cells + 16 * d * min(num_images, sample_size(num_clusters)) + products + order


def driver_bytes(settings: KMeansConfig, num_images: int, dim: int, num_clusters: int, num_workers: int) -> int:
    """``12 H N`` labels, as a matrix and as a file, ``8 K d`` sums of each worker, and ``4 H K d`` centroids."""
    cells = num_clusters * (settings.num_components or dim)
    labels = 12 * settings.num_starts * num_images
    return labels + 8 * (num_workers + 2) * cells + 4 * settings.num_starts * cells
