"""What a shard worker does, without Ray: answers for a part's images from its own, makes the part's files of all
shards' answers, and keeps on storage what a run that was killed takes up again.

A part lies on storage as two arrays and a small ``*.done.json``. Where near-duplicates are looked for, there is also
``*-found.npz``: what a second pass, among leaders, needs to know.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from icce_ray.config import Config
from icce_ray.embed.feature_matrix import load_features
from icce_ray.neighbors.audit import Audit, audit_prepared
from icce_ray.neighbors.duplicates import DuplicatePairs
from icce_ray.neighbors.faiss_engine import Engine
from icce_ray.neighbors.graph import make_engine, rule_of
from icce_ray.neighbors.graph_rows import (
    Rows,
    ids_to_search_again,
    merge_shards,
    part_ranges,
    rows_among_leaders,
    search_shard,
    shard_ids,
)
from icce_ray.neighbors.rule import Rule
from icce_ray.neighbors.search import Candidates
from icce_ray.neighbors.unit_features import Ids, PreparedFeatures, prepare
from icce_ray.runtime.machine import available_memory_bytes
from icce_ray.runtime.threads import set_threads
from icce_ray.store import Artifact, ArtifactWriter, Folder, Part

AUDIT_NAME = "audit"
MEAN_NAME = "mean.npy"
LEADERS_NAME = "leaders.npy"


@dataclass(frozen=True)
class PartTask:
    """One part to make: its number and the rows it covers. `among_leaders`: the second pass."""

    number: int
    start: int
    stop: int
    among_leaders: bool = False

    @property
    def name(self) -> str:
        return f"part-{self.number:05d}{'-among-leaders' * self.among_leaders}"

    @property
    def first_pass(self) -> PartTask:
        return replace(self, among_leaders=False)


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


def plan_parts(num_images: int) -> list[PartTask]:
    return [PartTask(number, start, stop) for number, (start, stop) in enumerate(part_ranges(num_images))]


def source_of(config: Config, embed: Artifact, version: int) -> str:
    """What parts are made from: the bytes of the embeddings, the settings, the stage's version."""
    checksums = [embed.part(name).sha256 for name in embed.part_names("part-")]
    settings = [config.neighbors.model_dump(), config.num_clusters, config.seed, version]
    return hashlib.sha256(json.dumps([checksums, settings]).encode()).hexdigest()[:16]


class ShardWorker:
    """Holds the images of one shard. Everything it needs lies on storage, so a new one can take its place.

    Args:
        config: the run's.
        embed: the embeddings.
        folder: where parts go.
        source: as `source_of` says.
        shard, num_shards: which of how many.
        num_threads: CPU threads of searches.
        device: torch device of searches; None: the CPU, by FAISS.
    """

    def __init__(
        self,
        config: Config,
        embed: Artifact,
        folder: Folder,
        source: str,
        shard: int,
        num_shards: int,
        num_threads: int,
        device: str | None,
    ) -> None:
        set_threads(num_threads)
        self.config = config
        self.embed = embed
        self.folder = folder
        self.source = source
        self.shard = shard
        self.num_shards = num_shards
        self.device = device
        self.num_threads = num_threads
        self.num_answers = 0
        self._engine: tuple[bool, Engine] | None = None

    def __repr__(self) -> str:
        """Its name in Ray's dashboard and in front of what it logs."""
        return f"neighbors: shard {self.shard + 1} of {self.num_shards}"

    @cached_property
    def prepared(self) -> PreparedFeatures:
        # Not in the constructor: an error there reaches the driver as a dead actor, and loses its own words.
        features_ND = load_features(self.embed).matrix
        is_centred = self.config.neighbors.center
        return PreparedFeatures(features_ND, _load_array(self.folder, MEAN_NAME) if is_centred else None)

    @cached_property
    def audited(self) -> Audit:
        return Audit.from_json(json.loads(self.folder.read_bytes(f"{AUDIT_NAME}.json")))

    @cached_property
    def rule(self) -> Rule:
        return rule_of(self.config.neighbors, self.audited, self.config.seed)

    @cached_property
    def leaders(self) -> Ids:
        """(N,) the leader of each image."""
        return _load_array(self.folder, LEADERS_NAME)

    def audit(self) -> Finished:
        """Audit the features, and leave their mean for the other workers."""
        prepared = prepare(load_features(self.embed).matrix, self.config.neighbors.center)
        audit = audit_prepared(
            prepared, self.config.neighbors, num_clusters=self.config.num_clusters, seed=self.config.seed
        )
        writer = ArtifactWriter(self.folder)
        files = [writer.write_json(f"{AUDIT_NAME}.json", audit.to_json())]
        if prepared.mean_D is not None:
            files.append(writer.write_array(MEAN_NAME, prepared.mean_D))
        self.prepared = prepared
        finished = Finished(self.source, files, {})
        finished.write(self.folder, AUDIT_NAME)
        return finished

    def available_memory_bytes(self) -> int:
        return available_memory_bytes()

    def answer(self, task: PartTask) -> list[Candidates]:
        """What this shard has to say about a part's images."""
        rule, leader_N = self._pass(task)
        answer = search_shard(self._engine_for(task), self.prepared, self._ids(task), rule, leader_N)
        self.num_answers += 1
        return answer

    def make(self, task: PartTask, *answers: list[Candidates]) -> Finished:
        """Make the part of all shards' answers, and write it."""
        rule, leader_N = self._pass(task)
        ids = self._ids(task)
        rows, duplicates = merge_shards(answers, self.prepared, ids, rule, leader_N, self.num_threads)
        if task.among_leaders:
            first_rows = read_rows(self.folder, task.first_pass)
            rows = rows_among_leaders(first_rows, task.start, self.leaders, ids, rows)
        writer = ArtifactWriter(self.folder)
        files = [
            writer.write_array(f"{task.name}-indptr.npy", rows.indptr),
            writer.write_array(f"{task.name}-indices.npy", rows.indices),
        ]
        if rule.duplicate_threshold is not None:
            files.append(_write_found(writer, task, rows.num_hits, duplicates))
        metrics = rows.summary(rule.min_neighbors) | {"num_duplicate_pairs": len(duplicates)}
        finished = Finished(self.source, files, metrics)
        finished.write(self.folder, task.name)
        return finished

    def _pass(self, task: PartTask) -> tuple[Rule, Ids | None]:
        if not task.among_leaders:
            return self.rule, None
        return replace(self.rule, duplicate_threshold=None), self.leaders

    def _ids(self, task: PartTask) -> Ids:
        if not task.among_leaders:
            return np.arange(task.start, task.stop)
        return ids_to_search_again(read_rows(self.folder, task.first_pass), task.start, self.leaders)

    def _engine_for(self, task: PartTask) -> Engine:
        if self._engine is None or self._engine[0] != task.among_leaders:
            self._engine = None  # the old one's memory goes before the new one's comes
            ids = shard_ids(len(self.prepared), self.shard, self.num_shards)
            if task.among_leaders:
                ids = ids[self.leaders[ids] == ids]
            self._engine = (
                task.among_leaders,
                make_engine(self.prepared, ids, self.device, self.num_threads),
            )
        return self._engine[1]


def read_rows(folder: Folder, task: PartTask) -> Rows:
    """A part of the first pass that near-duplicates were looked for in."""
    indptr = _load_array(folder, f"{task.name}-indptr.npy")
    return Rows(np.diff(indptr), _load_array(folder, f"{task.name}-indices.npy"), _read_found(folder, task)["num_hits"])


def read_duplicates(folder: Folder, tasks: list[PartTask]) -> DuplicatePairs:
    """The near-duplicates of all parts."""
    found = [_read_found(folder, task) for task in tasks]
    return DuplicatePairs.join([DuplicatePairs(part["higher"], part["lower"], part["units"]) for part in found])


def write_leaders(folder: Folder, leader_N: Ids) -> None:
    sink = io.BytesIO()
    np.save(sink, leader_N, allow_pickle=False)
    folder.write_bytes(LEADERS_NAME, sink.getbuffer())


def _write_found(writer: ArtifactWriter, task: PartTask, num_hits: Ids, duplicates: DuplicatePairs) -> Part:
    sink = io.BytesIO()
    np.savez(sink, num_hits=num_hits, higher=duplicates.higher_P, lower=duplicates.lower_P, units=duplicates.units_P)
    return writer.write_bytes(f"{task.name}-found.npz", sink.getbuffer(), rows=len(num_hits))


def _read_found(folder: Folder, task: PartTask) -> dict[str, Ids]:
    with np.load(io.BytesIO(folder.read_bytes(f"{task.name}-found.npz")), allow_pickle=False) as found:
        return dict(found)


def _load_array(folder: Folder, name: str) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(io.BytesIO(folder.read_bytes(name)), allow_pickle=False)
    return array
