"""The sample stage on Ray: tasks copy the drawn rows out of the embedding parts."""

from __future__ import annotations

from typing import Any

import ray

from icce_ray.config import Config
from icce_ray.errors import WorkerError
from icce_ray.runtime.ray_cluster import connect
from icce_ray.sample.draw import PART_PREFIX, SamplePart, plan_parts, sample_rows, write_part
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Part

MAX_RETRIES = 3
TASKS_IN_FLIGHT = 64


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Draw the images that take part in training. Without parts: all do.

    Returns:
        The metrics of the embeddings, with num_images (that take part) and num_embedded.

    Raises:
        WorkerError: tasks died more often than they are retried.
    """
    embed = context.inputs["embed"]
    num_embedded = sum(embed.part(name).rows or 0 for name in embed.part_names(PART_PREFIX))
    rows = sample_rows(num_embedded, config.heads.max_images, config.seed)
    metrics = dict(embed.metrics) | {"num_embedded": num_embedded, "num_images": num_embedded}
    if rows is None:
        return metrics
    connect(config.resources)
    parts = plan_parts(embed, rows)
    task = ray.remote(_write).options(name="sample: copy rows", num_cpus=1, max_retries=MAX_RETRIES)
    done, running, waiting = 0, dict[Any, SamplePart](), list(reversed(parts))
    context.progress.update(0, len(rows))
    try:
        while waiting or running:
            while waiting and len(running) < TASKS_IN_FLIGHT:
                part = waiting.pop()
                running[task.remote(part, embed, context.output)] = part
            ready, _ = ray.wait(list(running), num_returns=1)
            context.output.add(ray.get(ready[0]))
            done += running.pop(ready[0]).num_rows
            context.progress.update(done, len(rows))
    except ray.exceptions.WorkerCrashedError as error:
        raise WorkerError(f"sample: a process died {MAX_RETRIES + 1} times; the same command tries again") from error
    return metrics | {"num_images": len(rows)}


def _write(part: SamplePart, embed: Artifact, output: ArtifactWriter) -> Part:
    return write_part(part, embed, output)
