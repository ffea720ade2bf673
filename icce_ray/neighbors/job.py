"""The neighbors stage on Ray: parts of the graph built by actors that write them straight to storage.

What a part holds depends on the features and the settings only, so any number of workers makes the same parts. Beside
each part lies a small ``*.done.json``: a run that was killed takes up the parts that have one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray
from pydantic import ValidationError

from icce_ray.cluster import connect, worker_cpus
from icce_ray.config import Config
from icce_ray.context import StageContext
from icce_ray.embed.features import load_features
from icce_ray.errors import ResourceError, WorkerError
from icce_ray.neighbors.audit import Audit, audit_prepared
from icce_ray.neighbors.graph import Rows, build_rows, part_ranges
from icce_ray.neighbors.memory import available_memory_bytes
from icce_ray.neighbors.search import Floats, prepare, set_threads
from icce_ray.sample.draw import training_set
from icce_ray.store import Artifact, ArtifactWriter, Folder, Part
from icce_ray.store.artifact import cache_folder

VERSION = 1
MAX_RESTARTS = 5
PARTS_IN_FLIGHT = 2
AUDIT_NAME = "audit"


@dataclass(frozen=True)
class PartTask:
    """One part to build: its name and the rows it covers."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Finished:
    """A part that lies on storage, as its ``*.done.json`` says: what it was made from, its files, its figures."""

    source: str
    files: list[Part]
    metrics: dict[str, Any]

    def write(self, folder: Folder, name: str) -> None:
        files = [file.model_dump(mode="json") for file in self.files]
        content = {"source": self.source, "files": files, "metrics": self.metrics}
        folder.write_bytes(f"{name}.done.json", json.dumps(content).encode())

    @classmethod
    def find(cls, folder: Folder, name: str, source: str) -> Finished | None:
        """The finished part, or None where it was not finished, lacks a file, or was made from something else."""
        try:
            content = json.loads(folder.read_bytes(f"{name}.done.json"))
            finished = cls(content["source"], [Part(**file) for file in content["files"]], content["metrics"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, ValidationError):
            return None
        whole = all(folder.size(file.name) == file.num_bytes for file in finished.files)
        return finished if finished.source == source and whole else None


class NeighborWorker:
    """Holds the prepared features of its machine, memory-mapped, and makes parts. Restarts from its arguments alone."""

    def __init__(self, config: Config, embed: Artifact, folder: Folder, source: str, num_threads: int) -> None:
        set_threads(num_threads)
        self.config = config
        self.folder = folder
        self.source = source
        self.embed = embed
        self.cache_path = _prepared_path(source)

    @cached_property
    def base(self) -> Floats:
        # Not in the constructor: an error there reaches the driver as a dead actor, and loses its own words.
        return _load_prepared(self.embed, self.config.neighbors.center, self.cache_path)

    def audit(self) -> Finished:
        audit = audit_prepared(
            self.base, self.config.neighbors, num_clusters=self.config.num_clusters, seed=self.config.seed
        )
        file = ArtifactWriter(self.folder).write_json(f"{AUDIT_NAME}.json", audit.to_json())
        finished = Finished(self.source, [file], {})
        finished.write(self.folder, AUDIT_NAME)
        return finished

    def available_memory_bytes(self) -> int:
        return available_memory_bytes()

    def build(self, task: PartTask, threshold: float | None) -> Finished:
        neighbors = self.config.neighbors
        rows = build_rows(
            self.base,
            task.start,
            task.stop,
            threshold=threshold,
            min_neighbors=neighbors.min_neighbors,
            max_neighbors=neighbors.max_neighbors,
            seed=self.config.seed,
        )
        writer = ArtifactWriter(self.folder)
        files = [
            writer.write_array(f"{task.name}-indptr.npy", rows.indptr),
            writer.write_array(f"{task.name}-indices.npy", rows.indices),
        ]
        finished = Finished(self.source, files, rows.summary())
        finished.write(self.folder, task.name)
        return finished

    def close(self) -> None:
        """Free the disk; whoever has the file mapped keeps it."""
        self.cache_path.unlink(missing_ok=True)


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Build the graph's parts and the audit into the artifact.

    Returns:
        similarity_threshold, num_images, num_edges, mean_neighbors, min_neighbors, max_neighbors (as found),
        share_at_min (rows that had fewer above the threshold than `min_neighbors`).

    Raises:
        InputError: features that are not finite.
        ResourceError: a machine lacks the memory; the message says what is needed.
        WorkerError: a worker died more often than it is restarted.
    """
    connect(config.resources)
    embed = training_set(context.inputs)
    folder = context.output.folder
    num_images = load_features(embed).num_images
    source = _source_of(config, embed)
    tasks = [
        PartTask(f"part-{number:05d}", start, stop) for number, (start, stop) in enumerate(part_ranges(num_images))
    ]
    found = {task: Finished.find(folder, task.name, source) for task in tasks}
    pending = [task for task in tasks if found[task] is None]
    finished = {task: part for task, part in found.items() if part is not None}
    audited = Finished.find(folder, AUDIT_NAME, source)
    if pending or audited is None:
        num_workers = min(config.resources.neighbors.num_workers, max(1, len(pending)))
        workers = _start_workers(config, embed, folder, source, num_workers)
        try:
            audited = audited or ray.get(workers[0].audit.remote())
            audit = Audit.from_json(json.loads(folder.read_bytes(f"{AUDIT_NAME}.json")))
            _check_memory(workers, audit)
            finished |= _build_all(workers, pending, audit.similarity_threshold, num_images, context)
            ray.get([worker.close.remote() for worker in workers])
        except ray.exceptions.RayActorError as error:
            raise WorkerError(
                f"neighbors: a worker died {MAX_RESTARTS + 1} times ({' '.join(str(error).split())[:300]}); finished "
                "parts stay, the same command resumes. Out of memory is the usual cause: lower "
                "resources.neighbors.num_workers"
            ) from error
        finally:
            for worker in workers:
                ray.kill(worker)
    assert audited is not None
    for part in [audited, *(finished[task] for task in tasks)]:
        for file in part.files:
            context.output.add(file)
    audit = Audit.from_json(json.loads(folder.read_bytes(f"{AUDIT_NAME}.json")))
    return Rows.join_summaries([finished[task].metrics for task in tasks]) | {
        "similarity_threshold": audit.similarity_threshold
    }


def _start_workers(config: Config, embed: Artifact, folder: Folder, source: str, num_workers: int) -> list[Any]:
    resources = config.resources.neighbors
    cpus = worker_cpus(resources)
    actor = ray.remote(NeighborWorker).options(
        num_cpus=cpus, num_gpus=resources.gpus_per_worker, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS
    )
    return [actor.remote(config, embed, folder, source, max(1, int(cpus))) for _ in range(num_workers)]


def _build_all(
    workers: list[Any],
    pending: list[PartTask],
    threshold: float | None,
    num_images: int,
    context: StageContext,
) -> dict[PartTask, Finished]:
    """Keep every worker busy until all parts are built."""
    finished: dict[PartTask, Finished] = {}
    done_rows = num_images - sum(task.stop - task.start for task in pending)
    context.progress.update(done_rows, num_images)
    waiting = list(reversed(pending))
    running: dict[Any, tuple[PartTask, Any]] = {}

    def submit(worker: Any) -> None:
        if waiting:
            task = waiting.pop()
            running[worker.build.remote(task, threshold)] = (task, worker)

    for _ in range(PARTS_IN_FLIGHT):
        for worker in workers:
            submit(worker)
    while running:
        ready, _ = ray.wait(list(running), num_returns=1)
        task, worker = running.pop(ready[0])
        finished[task] = ray.get(ready[0])
        submit(worker)
        done_rows += task.stop - task.start
        context.progress.update(done_rows, num_images)
    return finished


def _check_memory(workers: list[Any], audit: Audit) -> None:
    """Refuse before the search starts; what a part takes at worst, times the workers, in the least free machine."""
    needed = audit.base_bytes + len(workers) * audit.worker_bytes
    # The features are mapped already, and what is mapped counts as available.
    available = min(ray.get([worker.available_memory_bytes.remote() for worker in workers]))
    if needed > available:
        raise ResourceError(
            f"neighbors: {audit.num_images:,} images x {audit.dim} dimensions with {audit.mean_neighbors:,.0f} "
            f"neighbours on average need {needed / 1e9:.1f} GB with {len(workers)} workers; available: "
            f"{available / 1e9:.1f} GB. Lower resources.neighbors.num_workers or neighbors.max_neighbors, or use a "
            "machine with more memory"
        )


def _source_of(config: Config, embed: Artifact) -> str:
    """What parts are made from: the bytes of the embeddings, the settings, this module's version."""
    checksums = [embed.part(name).sha256 for name in embed.part_names("part-")]
    settings = [config.neighbors.model_dump(), config.num_clusters, config.seed, VERSION]
    return hashlib.sha256(json.dumps([checksums, settings]).encode()).hexdigest()[:16]


def _prepared_path(source: str) -> Path:
    return cache_folder() / "neighbors" / f"prepared-{source}.npy"


def _load_prepared(embed: Artifact, center: bool, path: Path) -> Floats:
    """The prepared features as a memory map; the first worker of a machine makes the file, the others wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            features_ND = load_features(embed).matrix
            _check_disk(path.parent, features_ND.size * 4)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            try:
                base_ND = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=features_ND.shape)
                prepare(features_ND, center, out=base_ND)
                base_ND.flush()
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        mapped: Floats = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _check_disk(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ResourceError(
            f"neighbors: {folder} needs {num_bytes / 1e9:.1f} GB for the prepared features and has {free / 1e9:.1f} GB "
            "free. Point ICCE_CACHE to a folder with more"
        )
