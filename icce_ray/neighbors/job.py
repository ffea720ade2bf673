"""The neighbors stage on Ray: the embeddings are divided over shard actors, parts of the graph stream through all.

For each part every shard answers from its own images; when the answers are there, the shards take turns in making the
part of them and writing it to storage. So memory is bounded by a few parts, and what a part holds depends on the
features and the settings only. A shard that dies is started again from storage, and only what it was doing is redone.
A run that was killed takes up the parts that are on storage.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from icce_ray.config import Config
from icce_ray.embed.feature_matrix import load_features
from icce_ray.errors import ResourceError, WorkerError, find_cause
from icce_ray.neighbors.audit import Audit
from icce_ray.neighbors.duplicates import DuplicatePairs, group_table, leaders, pair_table
from icce_ray.neighbors.graph_rows import Rows
from icce_ray.neighbors.search_memory import needed_bytes
from icce_ray.neighbors.shards import (
    AUDIT_NAME,
    Finished,
    PartTask,
    ShardWorker,
    plan_parts,
    read_duplicates,
    source_of,
    write_leaders,
)
from icce_ray.neighbors.stage import NEIGHBORS
from icce_ray.neighbors.unit_features import Ids
from icce_ray.runtime.cluster_resources import wait_for_machines, worker_cpus
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import connect
from icce_ray.sample.draw import training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, Folder

MAX_RESTARTS = 5
PARTS_IN_FLIGHT = 3


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Build the graph's parts, the audit and the lists of near-duplicates into the artifact.

    Returns:
        similarity_threshold, duplicate_threshold, num_images, num_edges, mean_neighbors, min_neighbors, max_neighbors
        (as found), share_at_min (rows that had fewer above the threshold than `min_neighbors`), num_duplicate_pairs,
        num_left_out (near-duplicates that have no row, since their leader has one; the figures of rows are those of the
        others).

    Raises:
        InputError: features that are not finite.
        ResourceError: a machine lacks the memory; the message says what is needed.
        WorkerError: a worker died more often than it is restarted.
    """
    embed = training_set(context.inputs)
    connect(config.resources)
    wait_for_machines(config.resources, "neighbors", context.progress.note)
    folder = context.output.folder
    graph = _build(config, embed, folder, source_of(config, embed, NEIGHBORS.version), context.progress)
    for part in [*graph.finished, graph.audited]:
        for file in part.files:
            context.output.add(file)
    image_ids = load_features(embed).image_ids
    context.output.write_table("duplicate_pairs.parquet", pair_table(graph.duplicates, image_ids))
    context.output.write_table("duplicate_groups.parquet", group_table(graph.leader_N, image_ids))
    _remove_intermediate_files(folder, set(context.output.parts))
    leader_N, audit = graph.leader_N, graph.audit
    return Rows.join_summaries([part.metrics for part in graph.finished]) | {
        "similarity_threshold": audit.similarity_threshold,
        "duplicate_threshold": audit.duplicate_threshold,
        "num_duplicate_pairs": len(graph.duplicates),
        "num_left_out": 0 if leader_N is None else int((leader_N != np.arange(len(leader_N))).sum()),
    }


@dataclass(frozen=True)
class StoredGraph:
    """The graph, in parts on storage."""

    audit: Audit
    audited: Finished
    finished: list[Finished]
    duplicates: DuplicatePairs
    leader_N: Ids | None


def _build(config: Config, embed: Artifact, folder: Folder, source: str, progress: Progress) -> StoredGraph:
    tasks = plan_parts(load_features(embed).num_images)
    shards = Shards(config, embed, folder, source)
    try:
        audited = Finished.find(folder, AUDIT_NAME, source) or shards.audit()
        audit = Audit.from_json(json.loads(folder.read_bytes(f"{AUDIT_NAME}.json")))
        finished = shards.make(tasks, audit, progress)
        duplicates, leader_N = _duplicates(tasks, audit, folder, config.neighbors.min_neighbors)
        if leader_N is not None:
            write_leaders(folder, leader_N)
            tasks = [replace(task, among_leaders=True) for task in tasks]
            finished = shards.make(tasks, audit, progress)
    except ray.exceptions.RayError as error:
        if find_cause(error, ray.exceptions.RayActorError) is None:
            raise
        raise WorkerError(
            f"neighbors: a worker died {MAX_RESTARTS + 1} times ({' '.join(str(error).split())[:300]}); finished "
            "parts stay, the same command resumes. Out of memory is the usual cause: use more machines, or fewer "
            "workers on each (resources.neighbors)"
        ) from error
    finally:
        shards.stop()
    return StoredGraph(audit, audited, finished, duplicates, leader_N)


class Shards:
    """The shard actors; they are started when there is something to do."""

    def __init__(self, config: Config, embed: Artifact, folder: Folder, source: str) -> None:
        self.config = config
        self.arguments = (config, embed, folder, source)
        self.folder = folder
        self.source = source
        self.num_images = load_features(embed).num_images
        self.actors: list[Any] = []

    def start(self) -> list[Any]:
        if not self.actors:
            resources = self.config.resources.neighbors
            num_shards = min(resources.num_workers, self.num_images)
            cpus = worker_cpus(resources)
            device = "cuda" if resources.gpus_per_worker else None
            actor = ray.remote(ShardWorker).options(
                num_cpus=cpus,
                num_gpus=resources.gpus_per_worker,
                max_restarts=MAX_RESTARTS,
                max_task_retries=MAX_RESTARTS,
            )
            self.actors = [
                actor.remote(*self.arguments, shard, num_shards, max(1, int(cpus)), device)
                for shard in range(num_shards)
            ]
        return self.actors

    def stop(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def audit(self) -> Finished:
        finished: Finished = ray.get(self.start()[0].audit.remote())
        return finished

    def make(self, tasks: list[PartTask], audit: Audit, progress: Progress) -> list[Finished]:
        """All parts of a pass; those that are on storage are not made again."""
        finished = {task: Finished.find(self.folder, task.name, self.source) for task in tasks}
        pending = [task for task in reversed(tasks) if finished[task] is None]
        done = self.num_images - sum(task.stop - task.start for task in pending)
        if pending:
            _check_memory(self.start(), audit)
        answering: dict[Any, tuple[PartTask, list[Any]]] = {}
        making: dict[Any, PartTask] = {}
        while pending or answering or making:
            progress.update(done, self.num_images)
            while pending and len({task for task, _ in answering.values()}) + len(making) < PARTS_IN_FLIGHT:
                task = pending.pop()
                answers = [actor.answer.remote(task) for actor in self.actors]
                answering |= dict.fromkeys(answers, (task, answers))
            ready, _ = ray.wait([*making, *answering], num_returns=1, fetch_local=False)
            if ready[0] in making:
                task = making.pop(ready[0])
                finished[task] = ray.get(ready[0])
                done += task.stop - task.start
                continue
            task, answers = answering.pop(ready[0])
            if not any(answer in answering for answer in answers):
                maker = self.actors[task.number % len(self.actors)]
                making[maker.make.remote(task, *answers)] = task
        progress.update(done, self.num_images)
        return [part for task in tasks if (part := finished[task]) is not None]


def _duplicates(
    tasks: list[PartTask], audit: Audit, folder: Folder, min_neighbors: int
) -> tuple[DuplicatePairs, Ids | None]:
    if audit.duplicate_threshold is None:
        return DuplicatePairs.join([]), None
    duplicates = read_duplicates(folder, tasks)
    return duplicates, leaders(audit.num_images, duplicates, min(min_neighbors, audit.num_images - 1) + 1)


def _check_memory(actors: list[Any], audit: Audit) -> None:
    """Refuse before the search starts, with what each machine needs at worst for the workers on it."""
    machines: dict[str, list[int]] = defaultdict(list)
    for node, available in ray.get([actor.__ray_call__.remote(_machine_memory) for actor in actors]):
        machines[node].append(available)
    for available in machines.values():
        needed = needed_bytes(audit.base_bytes, audit.worker_bytes, len(available), len(actors))
        if needed > min(available):
            raise ResourceError(
                f"neighbors: {audit.num_images:,} images x {audit.dim} dimensions with {audit.mean_neighbors:,.0f} "
                f"neighbours on average need {needed / 1e9:.1f} GB on a machine with {len(available)} of "
                f"{len(actors)} workers; available: {min(available) / 1e9:.1f} GB. Use more machines, lower "
                "resources.neighbors.num_workers or neighbors.max_neighbors"
            )


def _machine_memory(worker: ShardWorker) -> tuple[str, int]:
    return ray.get_runtime_context().get_node_id(), worker.available_memory_bytes()


def _remove_intermediate_files(folder: Folder, kept: set[str]) -> None:
    """What only the second pass needed."""
    for name in folder.names():
        if name.endswith((".npy", ".npz")) and name not in kept:
            folder.remove(name)
