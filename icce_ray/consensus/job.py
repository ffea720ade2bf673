"""The consensus stage on Ray: tasks go through the label matrix in pieces, here their counts are added up.

What is here besides: the graph of the head clusters, tables of K x C and some vectors of N (`consensus/memory.py`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray

from icce_ray.config import Config
from icce_ray.consensus.best_consensus import find_consensus
from icce_ray.consensus.consensus_memory import check_memory
from icce_ray.consensus.extra_runs import find_heads
from icce_ray.consensus.in_process import write_parts
from icce_ray.consensus.label_matrix import Heads, check_surveys
from icce_ray.consensus.stored_label_matrix import StoredHeads, open_heads
from icce_ray.errors import DamagedArtifactError, WorkerError, describe_cause, find_cause
from icce_ray.methods.clusterings import read_losses
from icce_ray.runtime.cluster_resources import available_cpus
from icce_ray.runtime.ray_cluster import connect
from icce_ray.stage import StageContext

MAX_RETRIES = 3
PIECES_IN_FLIGHT = 2
"""For each CPU: enough to keep it busy, and no more answers than that wait in memory."""


@dataclass(frozen=True)
class RayHeads(StoredHeads):
    """Stored heads whose pieces are worked on by Ray tasks."""

    def map(self, function: Callable[..., Any], pieces: Iterable[tuple[int, ...]], *shared: Any) -> Iterator[Any]:
        task = WORK_ON_PIECE.options(name=f"consensus: {_words(function)}", max_retries=MAX_RETRIES)
        inputs: Any = ray.put((StoredHeads(self.runs, self.values), shared))
        limit = max(1, int(PIECES_IN_FLIGHT * available_cpus()))
        running: deque[Any] = deque()
        for piece in pieces:
            running.append(task.remote(function, inputs, piece))
            if len(running) >= limit:
                yield ray.get(running.popleft())
        while running:
            yield ray.get(running.popleft())


def _work_on_piece(function: Callable[..., Any], inputs: tuple[Heads, tuple[Any, ...]], piece: tuple[int, ...]) -> Any:
    heads, shared = inputs
    return function(heads, *piece, *shared)


def _words(function: Callable[..., Any]) -> str:
    """A function's name as the dashboard shows it: ``count codes``."""
    return str(getattr(function, "__name__", function)).strip("_").replace("_", " ")


WORK_ON_PIECE = ray.remote(_work_on_piece)
"""Made once: each `ray.remote` is sent to the workers anew."""


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Make one clustering of all heads: labels.npy, agreement.npy, vote_entropy.npy, second_choice.npy, summary.json,
    hierarchy.parquet.

    Returns:
        method, anmi (of the labels, 0 to 1), anmi_by_method and start_anmi_by_method (after and before refinement),
        skipped (method: reason), repaired (method: clusters that it left empty), mean_agreement, num_clusters (used),
        smallest_cluster, median_cluster, largest_cluster (images), num_heads (of all runs).

    Raises:
        InputError: labels that cannot be used, or extra runs that are not there or have other images.
        ResourceError: this machine lacks the memory; the message says what is needed.
        WorkerError: tasks died more often than they are retried.
    """
    connect(config.resources)
    own = context.inputs["method"]
    extra = find_heads(config, own)
    try:
        heads = _survey(open_heads([own, *extra]))
        check_memory(heads, config.num_clusters, config.consensus, num_workers=_num_workers_here())
        result = find_consensus(
            heads,
            config.num_clusters,
            config.consensus,
            seed=config.seed,
            # Losses of runs with other settings cannot be compared.
            head_losses=None if extra else read_losses(own),
            say=context.progress.update,
        )
    except ray.exceptions.RayError as error:
        damage = find_cause(error, DamagedArtifactError)
        if damage is not None:
            raise damage from None
        raise WorkerError(
            f"consensus: a task failed {MAX_RETRIES + 1} times; the same command starts this stage again. "
            f"{describe_cause(error)}"
        ) from error
    return write_parts(result, heads.num_heads, config, context)


def _survey(heads: StoredHeads) -> RayHeads:
    """The heads with the labels that they use."""
    on_ray = RayHeads(heads.runs, heads.values)
    return replace(on_ray, values=check_surveys(list(on_ray.map(StoredHeads.survey, on_ray.image_pieces()))))


def _num_workers_here() -> int:
    return max(1, min(int(available_cpus()), os.cpu_count() or 1))
