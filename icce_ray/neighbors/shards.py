"""A shard worker, without Ray: searches the images of its shard, and makes parts of the graph from all shards' answers.

A part lies on storage as three arrays: ``<name>-indptr.npy``, ``<name>-indices.npy``, and ``<name>-nearest.npy`` with
the most similar neighbours of each image.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from icce_ray.config import NeighborsConfig
from icce_ray.embed.feature_matrix import load_features
from icce_ray.neighbors.adaptive_rule import Rule
from icce_ray.neighbors.audit import Audit, audit_features
from icce_ray.neighbors.graph import NEAREST_SUFFIX, merge_shards, part_ranges, search_shard
from icce_ray.neighbors.search import Candidates
from icce_ray.runtime.threads import set_threads
from icce_ray.sample.unit_features import UnitFeatures, prepare
from icce_ray.store import Artifact, ArtifactWriter
from icce_ray.store.part_records import PartRecord, PartRecords

if TYPE_CHECKING:
    from icce_ray.neighbors.torch_engine import TorchEngine

AUDIT = "audit"
MEAN_NAME = "mean.npy"


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
