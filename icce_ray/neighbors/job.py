"""The neighbors stage on Ray: the embeddings are divided over shard actors, and each part of the graph needs all.

For each part, every shard answers from its own images; then one of the shards, in turn, makes the part from the answers
and writes it to storage. So memory is bounded by a few parts, and a part depends only on the features and the settings.
A shard that dies is started again from storage, and only its unfinished work is redone. A killed run resumes with the
parts on storage: each is three arrays, ``<name>-indptr.npy``, ``<name>-indices.npy``, and ``<name>-nearest.npy`` with
the most similar neighbours of each image.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from icce_ray.config import Config, NeighborsConfig, ResourcesConfig, WorkerResources
from icce_ray.embed.feature_matrix import load_features
from icce_ray.neighbors.adaptive_rule import Rule
from icce_ray.neighbors.audit import Audit, audit_features
from icce_ray.neighbors.graph import NEAREST_SUFFIX, Rows, merge_shards, part_ranges, search_shard
from icce_ray.neighbors.search import Candidates, needed_bytes
from icce_ray.neighbors.stage import NEIGHBORS
from icce_ray.runtime.cluster_resources import memory_of_machines, wait_for_machines, worker_threads
from icce_ray.runtime.machine import require_memory, usable_cpus
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import connect, runs_here
from icce_ray.runtime.threads import set_threads
from icce_ray.runtime.workers import start_actors, stop_actors, translated_errors
from icce_ray.sample.training_set import source_digest, training_set
from icce_ray.sample.unit_features import UnitFeatures, prepare
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter
from icce_ray.store.part_records import PartRecord, PartRecords

if TYPE_CHECKING:
    from icce_ray.neighbors.torch_engine import TorchEngine

PARTS_IN_FLIGHT = 3
AUDIT = "audit"
MEAN_NAME = "mean.npy"


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Build the graph's parts and the audit into the artifact.

    Returns similarity_threshold, num_images, num_edges, mean_neighbors, min_neighbors, max_neighbors (as found),
    share_at_min (rows that had fewer above the threshold than `min_neighbors`). Raises InputError: features that are
    not finite; ResourceError: a machine lacks the memory; the message says how much is needed; WorkerError: a worker
    died more often than it is restarted.
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
    """The audit and all parts, made by shard actors; what is on storage is not made again."""
    import ray

    audited, finished = task.records.read(AUDIT), task.records.read_all()
    if audited is None or any(part.name not in finished for part in task.parts):
        connect(resources)
        wait_for_machines(resources, "neighbors", progress.note)
        actors = start_shards(task, resources.neighbors)
        try:
            with translated_errors("neighbors"):
                audited = audited or ray.get(actors[0].audit.remote())
                _check_memory(actors, task.read_audit())
                finished |= _make_parts(actors, task.parts, finished, progress)
        finally:
            stop_actors(actors)
    return audited, [finished[part.name] for part in task.parts]


def start_shards(task: GraphTask, resources: WorkerResources) -> list[Any]:
    """The actors, one for each shard."""
    num_shards = min(resources.num_workers, task.parts[-1].stop)
    device = "cuda" if resources.gpus_per_worker else "cpu"
    rest = num_shards, worker_threads(resources), device
    return start_actors(ShardWorker, resources, [(task, shard, *rest) for shard in range(num_shards)])


def _make_parts(
    actors: list[Any], parts: list[GraphPart], finished: Mapping[str, PartRecord], progress: Progress
) -> dict[str, PartRecord]:
    """The parts that are not finished."""
    import ray

    pending, made = [part for part in reversed(parts) if part.name not in finished], dict[str, PartRecord]()
    num_images = parts[-1].stop
    done = num_images - sum(part.stop - part.start for part in pending)
    answering: dict[Any, tuple[GraphPart, list[Any]]] = {}
    making: dict[Any, GraphPart] = {}
    while pending or answering or making:
        progress.update(done, num_images)
        while pending and len({part for part, _ in answering.values()}) + len(making) < PARTS_IN_FLIGHT:
            part = pending.pop()
            answers = [actor.answer.remote(part) for actor in actors]
            answering |= dict.fromkeys(answers, (part, answers))
        ready, _ = ray.wait([*making, *answering], num_returns=1, fetch_local=False)
        if ready[0] in making:
            part = making.pop(ready[0])
            made[part.name] = ray.get(ready[0])
            done += part.stop - part.start
            continue
        part, answers = answering.pop(ready[0])
        if not any(answer in answering for answer in answers):
            making[actors[part.number % len(actors)].make.remote(part, *answers)] = part
    progress.update(done, num_images)
    return made


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


@dataclass(frozen=True)
class GraphPart:
    """One part of the graph: its number and the rows it holds."""

    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"part-{self.number:05d}"


@dataclass(frozen=True)
class GraphTask:
    """The task of all shards: the embeddings, the settings, and where results go."""

    embed: Artifact
    config: NeighborsConfig
    num_clusters: int
    seed: int
    records: PartRecords

    @cached_property
    def parts(self) -> list[GraphPart]:
        ranges = part_ranges(load_features(self.embed).num_images)
        return [GraphPart(number, start, stop) for number, (start, stop) in enumerate(ranges)]

    def read_audit(self) -> Audit:
        """The finished audit."""
        return Audit(**json.loads(self.records.folder.read_bytes(f"{AUDIT}.json")))


@dataclass(repr=False, eq=False)
class ShardWorker:
    """Holds the images of one shard. Everything it needs lies on storage, so a new one can replace it."""

    task: GraphTask
    shard: int
    num_shards: int
    num_threads: int
    """CPU threads of searches."""
    device: str
    """Torch device of searches."""
    num_answers: int = 0

    def __post_init__(self) -> None:
        set_threads(self.num_threads)

    def __repr__(self) -> str:
        """The name in Ray's dashboard and in front of log lines."""
        return f"neighbors: shard {self.shard + 1} of {self.num_shards}"

    # These are not made in the constructor: an error there reaches the driver as a dead actor, without its message.
    @cached_property
    def unit(self) -> UnitFeatures:
        features_ND = load_features(self.task.embed).matrix
        if not self.task.config.center:
            return UnitFeatures(features_ND, None)
        mean = io.BytesIO(self.task.records.folder.read_bytes(MEAN_NAME))
        return UnitFeatures(features_ND, np.load(mean, allow_pickle=False))

    @cached_property
    def rule(self) -> Rule:
        return self.task.read_audit().rule(self.task.config, self.task.seed)

    @cached_property
    def engine(self) -> TorchEngine:
        import torch  # takes seconds

        from icce_ray.neighbors.torch_engine import TorchEngine

        torch.set_num_threads(self.num_threads)
        start, stop = (len(self.unit) * shard // self.num_shards for shard in (self.shard, self.shard + 1))
        return TorchEngine(self.unit, np.arange(start, stop), self.device, self.num_threads)

    def audit(self) -> PartRecord:
        """Audit the features, and leave their mean for the other workers."""
        task = self.task
        self.unit = prepare(load_features(task.embed).matrix, task.config.center)
        audit = audit_features(self.unit, task.config, num_clusters=task.num_clusters, seed=task.seed)
        writer = ArtifactWriter(task.records.folder)
        files = [writer.write_json(f"{AUDIT}.json", asdict(audit))]
        if self.unit.mean_D is not None:
            files.append(writer.write_array(MEAN_NAME, self.unit.mean_D))
        return task.records.write(AUDIT, files, {})

    def answer(self, part: GraphPart) -> list[Candidates]:
        """This shard's candidates for the images of a part."""
        answer = search_shard(self.engine, self.unit, np.arange(part.start, part.stop), self.rule)
        self.num_answers += 1
        return answer

    def make(self, part: GraphPart, *answers: list[Candidates]) -> PartRecord:
        """Make the part from the answers of all shards, and write it."""
        rows = merge_shards(answers, self.unit, np.arange(part.start, part.stop), self.rule, self.num_threads)
        writer = ArtifactWriter(self.task.records.folder)
        files = [
            writer.write_array(f"{part.name}-indptr.npy", rows.indptr),
            writer.write_array(f"{part.name}-indices.npy", rows.indices),
            writer.write_array(f"{part.name}{NEAREST_SUFFIX}", rows.nearest),
        ]
        return self.task.records.write(part.name, files, rows.summary(self.rule.min_neighbors))
