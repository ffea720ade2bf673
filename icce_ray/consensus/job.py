"""The consensus stage on Ray: a task for each part of the label matrix. The driver combines their results."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from icce_ray.config import Config, ResourcesConfig
from icce_ray.consensus import consensus_artifact
from icce_ray.consensus.label_matrix import Heads
from icce_ray.consensus.stored_label_matrix import StoredHeads
from icce_ray.methods.clusterings import LABELS_NAME
from icce_ray.runtime.cluster_resources import available_cpus
from icce_ray.runtime.ray_cluster import connect, runs_here
from icce_ray.runtime.workers import run_tasks
from icce_ray.stage import StageContext


@dataclass(frozen=True)
class RayHeads(StoredHeads):
    """Stored heads whose parts are worked on by tasks."""

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


def _work_on_part(part: tuple[int, ...], function: Callable[..., Any], heads: Heads, shared: tuple[Any, ...]) -> Any:
    return function(heads, *part, *shared)


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Make one clustering of all heads: files and metrics as in `consensus_artifact.run`. Raises InputError,
    ResourceError: as there; WorkerError: tasks died more often than they are retried."""
    _, num_images = context.inputs["method"].part(LABELS_NAME).shape or (0, 0)
    if runs_here(config.resources, num_images):
        return consensus_artifact.run(config, context)
    connect(config.resources)
    heads_type = partial(RayHeads, resources=config.resources)
    num_workers = max(1, min(int(available_cpus()), os.cpu_count() or 1))
    return consensus_artifact.run(config, context, heads_type=heads_type, num_workers=num_workers)
