"""The consensus stage: read the label matrices, make the consensus, write it as an artifact. On Ray there is a task for
each part of the label matrix, and the driver combines their results. Small collections are done in this process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.config import Config, ResourcesConfig
from icce_ray.consensus.aligned_vote import ARRAYS, describe_clusters
from icce_ray.consensus.best_consensus import find_consensus
from icce_ray.consensus.consensus_memory import check_memory
from icce_ray.consensus.hierarchy import HIERARCHY_NAME
from icce_ray.consensus.kept_numbers import keep_numbers
from icce_ray.consensus.label_matrix import Heads
from icce_ray.consensus.other_runs import IMAGE_IDS_NAME, find_heads, trained_ids
from icce_ray.consensus.stage import AUTO, NONE
from icce_ray.consensus.stored_label_matrix import StoredHeads, open_heads
from icce_ray.embed.feature_matrix import load_features
from icce_ray.methods.clusterings import LABELS_NAME, read_losses
from icce_ray.neighbors.graph import StoredNearest
from icce_ray.runtime.cluster_resources import available_cpus
from icce_ray.runtime.ray_cluster import connect, runs_here
from icce_ray.runtime.workers import run_tasks
from icce_ray.sample.training_set import training_set
from icce_ray.sample.unit_features import Floats, Ids, UnitFeatures, prepare
from icce_ray.stage import StageContext
from icce_ray.store import Artifact


@dataclass(frozen=True)
class RayHeads(StoredHeads):
    """Stored heads whose parts are worked on by tasks, or in this process."""

    resources: ResourcesConfig

    def map(self, function: Callable[..., Any], parts: Iterable[tuple[int, ...]], *shared: Any) -> Iterator[Any]:
        stored = StoredHeads(self.runs, self.order, self.values, self.unlabelled)
        arguments = (function, stored, shared)
        results = run_tasks(
            "consensus", _work_on_part, parts, arguments, resources=self.resources, num_images=self.num_images,
            name=function.__name__.strip("_"), in_order=True,
        )  # fmt: skip
        for _, result in results:
            yield result


@dataclass(frozen=True)
class StoredUnitFeatures:
    """The features that are trained on, prepared on access. Pickles: workers open the file themselves."""

    embed: Artifact
    shape: tuple[int, int]
    mean_D: npt.NDArray[np.float64] | None

    @classmethod
    def of(cls, embed: Artifact) -> StoredUnitFeatures:
        unit = prepare(load_features(embed).matrix, center=True)
        return cls(embed, unit.shape, unit.mean_D)

    def __getitem__(self, rows: slice | Ids) -> Floats:
        return UnitFeatures(load_features(self.embed).matrix, self.mean_D)[rows]


def _work_on_part(part: tuple[int, ...], function: Callable[..., Any], heads: Heads, shared: tuple[Any, ...]) -> Any:
    return function(heads, *part, *shared)


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Make one clustering of all heads and write image_ids.npy, labels.npy, agreement.npy, vote_entropy.npy,
    second_choice.npy, summary.json and hierarchy.parquet.

    Returns method, anmi (of the labels, 0 to 1), anmi_by_method and start_anmi_by_method (after and before refinement),
    graph_score_by_method (on the neighbour graph; empty without one), skipped (method: reason), repaired (method:
    clusters that it left empty), mean_agreement, num_relabelled (images that their features place), num_clusters
    (used), smallest_cluster, median_cluster, largest_cluster (images), num_heads (of all runs); with
    `consensus.numbers_from`, numbers: what became of the clusters of the earlier run. Raises InputError: labels that
    cannot be used, or extra runs that don't exist or have other images; ResourceError: this machine lacks the memory;
    the message says what is needed; WorkerError: tasks died more often than they are retried.
    """
    own, num_workers = context.inputs["method"], 1
    _, num_images = own.part(LABELS_NAME).shape or (0, 0)
    if not runs_here(config.resources, num_images):
        connect(config.resources)
        num_workers = max(1, min(int(available_cpus()), os.cpu_count() or 1))  # on this machine
    extra = find_heads(config.consensus.extra_runs, config.output, own)
    heads = open_heads([own, *extra], partial(RayHeads, resources=config.resources))
    graph = context.inputs.get("neighbors") if config.consensus.recombine else None
    check_memory(heads, config.num_clusters, config.consensus.methods, num_workers, has_graph=graph is not None)
    if config.consensus.recombine and graph is None:
        context.progress.note("recombined left out: the method has no neighbour graph")
    result = find_consensus(
        heads,
        config.num_clusters,
        config.consensus,
        seed=config.seed,
        # Losses of runs with other settings cannot be compared.
        head_losses=None if extra else read_losses(own),
        nearest=None if graph is None else StoredNearest(graph),
        unit_features=lambda: StoredUnitFeatures.of(training_set(context.inputs)),
        report=context.progress.update,
    )
    for method, reason in result.skipped.items():
        context.progress.note(f"{method} left out: {reason}")
    output, changes = context.output, {}
    if config.consensus.numbers_from not in (AUTO, NONE):
        result, changes["numbers"] = keep_numbers(
            result, config.num_clusters, own, config.consensus.numbers_from, config.output
        )
    output.write_array(IMAGE_IDS_NAME, trained_ids(own))
    for name in ("labels", *ARRAYS):
        output.write_array(f"{name}.npy", getattr(result, name))
    output.write_table(HIERARCHY_NAME, result.hierarchy.to_table())
    metrics = result.summary() | {"num_heads": heads.num_heads} | changes
    clusters = describe_clusters(result.labels, result.agreement, result.second_choice, config.num_clusters)
    output.write_json("summary.json", metrics | {"clusters": clusters})
    return metrics
