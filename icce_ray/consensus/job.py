"""The consensus stage on Ray: a task for each part of the label matrix. The driver combines their results."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from icce_ray.config import Config
from icce_ray.consensus import consensus_artifact
from icce_ray.consensus.label_matrix import Heads
from icce_ray.consensus.stored_label_matrix import StoredHeads
from icce_ray.errors import DamagedArtifactError, WorkerError, describe_cause, find_cause
from icce_ray.runtime.cluster_resources import available_cpus
from icce_ray.runtime.ray_cluster import connect
from icce_ray.stage import StageContext

MAX_RETRIES = 3
PARTS_IN_FLIGHT = 2
"""Tasks for each CPU: enough to keep it busy, and no more results than that wait in memory."""


@dataclass(frozen=True)
class RayHeads(StoredHeads):
    """Stored heads whose parts are worked on by Ray tasks."""

    def map(self, function: Callable[..., Any], parts: Iterable[tuple[int, ...]], *shared: Any) -> Iterator[Any]:
        task = WORK_ON_PART.options(name=f"consensus: {function.__name__.strip('_')}", max_retries=MAX_RETRIES)
        inputs: Any = ray.put((StoredHeads(self.runs, self.values), shared))
        limit = max(1, int(PARTS_IN_FLIGHT * available_cpus()))
        running: deque[Any] = deque()
        for part in parts:
            running.append(task.remote(function, inputs, part))
            if len(running) >= limit:
                yield ray.get(running.popleft())
        while running:
            yield ray.get(running.popleft())


def _work_on_part(function: Callable[..., Any], inputs: tuple[Heads, tuple[Any, ...]], part: tuple[int, ...]) -> Any:
    heads, shared = inputs
    return function(heads, *part, *shared)


WORK_ON_PART = ray.remote(_work_on_part)
"""Made once: each `ray.remote` is sent to the workers anew."""


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Make one clustering of all heads: files and metrics as in `consensus_artifact.run`.

    Raises:
        InputError, ResourceError: as there.
        WorkerError: tasks died more often than they are retried.
    """
    connect(config.resources)
    num_workers = max(1, min(int(available_cpus()), os.cpu_count() or 1))
    try:
        return consensus_artifact.run(config, context, heads_type=RayHeads, num_workers=num_workers)
    except ray.exceptions.RayError as error:
        damage = find_cause(error, DamagedArtifactError)
        if damage is not None:
            raise damage from None
        raise WorkerError(
            f"consensus: a task failed {MAX_RETRIES + 1} times; the same command starts this stage again. "
            f"{describe_cause(error)}"
        ) from error
