"""The neighbors stage on Ray: the embeddings are divided over shard actors, and each part of the graph needs all.

For each part, every shard answers from its own images; then one of the shards, in turn, makes the part from the answers
and writes it to storage. So memory is bounded by a few parts, and a part depends only on the features and the settings.
A shard that dies is started again from storage, and only its unfinished work is redone. A killed run resumes with the
parts on storage.
"""

from typing import Any

from icce_ray.config import Config, ResourcesConfig, WorkerResources
from icce_ray.embed.feature_matrix import load_features
from icce_ray.neighbors.audit import Audit
from icce_ray.neighbors.graph import Rows
from icce_ray.neighbors.search import needed_bytes
from icce_ray.neighbors.shards import AUDIT, GraphPart, GraphTask, ShardWorker
from icce_ray.neighbors.stage import NEIGHBORS
from icce_ray.runtime.cluster_resources import memory_of_machines, wait_for_machines, worker_threads
from icce_ray.runtime.machine import require_memory, usable_cpus
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import connect, runs_here
from icce_ray.runtime.workers import start_actors, stop_actors, translated_errors
from icce_ray.sample.training_set import source_digest, training_set
from icce_ray.stage import StageContext
from icce_ray.store.part_records import PartRecord, PartRecords

PARTS_IN_FLIGHT = 3


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Build the graph's parts and the audit into the artifact.

    Returns:
        similarity_threshold, num_images, num_edges, mean_neighbors, min_neighbors, max_neighbors (as found),
        share_at_min (rows that had fewer above the threshold than `min_neighbors`).

    Raises:
        InputError: features that are not finite.
        ResourceError: a machine lacks the memory; the message says how much is needed.
        WorkerError: a worker died more often than it is restarted.
    """
    embed = training_set(context.inputs)
    records = PartRecords(context.output.folder, source_digest(embed, NEIGHBORS.version))
    task = GraphTask(embed, config.neighbors, config.num_clusters, config.seed, records)
    if runs_here(config.resources, load_features(embed).num_images):
        audited, parts = _build_here(task, context.progress)
    else:
        audited, parts = _build_on_shards(task, config.resources, context.progress)
    for record in [audited, *parts]:
        for file in record.files:
            context.output.add(file)
    records.clear()
    summary = Rows.join_summaries([record.metrics for record in parts])
    return summary | {"similarity_threshold": task.read_audit().similarity_threshold}


def _build_here(task: GraphTask, progress: Progress) -> tuple[PartRecord, list[PartRecord]]:
    """The audit and all parts, made in this process by one shard."""
    worker = ShardWorker(task, 0, 1, usable_cpus(), "cpu")
    audited = task.records.read(AUDIT) or worker.audit()
    finished = task.records.read_all()
    for part in task.parts:
        if part.name not in finished:
            finished[part.name] = worker.make(part, worker.answer(part))
        progress.update(part.stop, task.parts[-1].stop)
    return audited, [finished[part.name] for part in task.parts]


def _build_on_shards(
    task: GraphTask, resources: ResourcesConfig, progress: Progress
) -> tuple[PartRecord, list[PartRecord]]:
    connect(resources)
    wait_for_machines(resources, "neighbors", progress.note)
    shards = Shards(task, resources.neighbors)
    try:
        with translated_errors("neighbors"):
            audited = task.records.read(AUDIT) or shards.audit()
            return audited, shards.make_parts(task.read_audit(), progress)
    finally:
        stop_actors(shards.actors)


class Shards:
    """The shard actors, started on first use."""

    def __init__(self, task: GraphTask, resources: WorkerResources) -> None:
        self.task = task
        self.resources = resources
        self.num_images = load_features(task.embed).num_images
        self.actors: list[Any] = []

    def start(self) -> list[Any]:
        if not self.actors:
            num_shards = min(self.resources.num_workers, self.num_images)
            device = "cuda" if self.resources.gpus_per_worker else "cpu"
            rest = num_shards, worker_threads(self.resources), device
            arguments = [(self.task, shard, *rest) for shard in range(num_shards)]
            self.actors = start_actors(ShardWorker, self.resources, arguments)
        return self.actors

    def audit(self) -> PartRecord:
        import ray

        record: PartRecord = ray.get(self.start()[0].audit.remote())
        return record

    def make_parts(self, audit: Audit, progress: Progress) -> list[PartRecord]:
        """All parts, in order; those on storage are not made again."""
        import ray

        finished = self.task.records.read_all()
        pending = [part for part in reversed(self.task.parts) if part.name not in finished]
        done = self.num_images - sum(part.stop - part.start for part in pending)
        if pending:
            _check_memory(self.start(), audit)
        answering: dict[Any, tuple[GraphPart, list[Any]]] = {}
        making: dict[Any, GraphPart] = {}
        while pending or answering or making:
            progress.update(done, self.num_images)
            while pending and len({part for part, _ in answering.values()}) + len(making) < PARTS_IN_FLIGHT:
                part = pending.pop()
                answers = [actor.answer.remote(part) for actor in self.actors]
                answering |= dict.fromkeys(answers, (part, answers))
            ready, _ = ray.wait([*making, *answering], num_returns=1, fetch_local=False)
            if ready[0] in making:
                part = making.pop(ready[0])
                finished[part.name] = ray.get(ready[0])
                done += part.stop - part.start
                continue
            part, answers = answering.pop(ready[0])
            if not any(answer in answering for answer in answers):
                maker = self.actors[part.number % len(self.actors)]
                making[maker.make.remote(part, *answers)] = part
        progress.update(done, self.num_images)
        return [finished[part.name] for part in self.task.parts]


def _check_memory(actors: list[Any], audit: Audit) -> None:
    """Refuse before the search starts, with what each machine needs at worst for the workers on it."""
    for count, available in memory_of_machines(actors):
        require_memory(
            needed_bytes(audit.base_bytes, audit.worker_bytes, count, len(actors)),
            available,
            f"neighbors: {audit.num_images:,} images x {audit.dim} dimensions with {audit.mean_neighbors:,.0f} "
            "neighbours on average",
            "Use more machines, lower resources.neighbors.num_workers or neighbors.max_neighbors",
            f" on a machine with {count} of {len(actors)} workers",
        )
