"""The work of a stage that trains, in worker processes: one alone is an actor, several are Ray Train's.

The work is a function, the same in every process. One that dies is started again, and so is work that fails by a fault
that may pass, MAX_RESTARTS times; what was finished before, the work has to find by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray

from icce_ray.config import WorkerResources
from icce_ray.errors import UserError, WorkerError, describe_cause
from icce_ray.runtime.progress import BoardProgress, Progress, ProgressBoard
from icce_ray.runtime.ray_cluster import worker_cpus

MAX_RESTARTS = 3
POLL_INTERVAL_S = 1.0

Work = Callable[..., Any]
"""Called with `num_threads`, `device` ("cpu" or "cuda", maybe numbered) and `progress`; all else that a process needs
to know is bound to it. A function that a module has by its name, so that a process imports what it needs; several find
each other by torch.distributed."""


def work_on_workers(
    stage: str,
    work: Work,
    workers: WorkerResources,
    progress: Progress,
    backend: str | None = None,
) -> Any:
    """What the work returns in the process of rank 0.

    Args:
        stage: its name, for messages.
        workers: how many processes, what each has, and whether Ray Train starts them.
        progress: told what the process of rank 0 reports.
        backend: of torch.distributed; None: NCCL on GPUs, else gloo.

    Raises:
        UserError, WorkerError: as the work raised it; it is not tried again.
        WorkerError: processes died, or the work failed, more often than it is tried again.
    """
    work = partial(work, num_threads=max(1, int(worker_cpus(workers))))
    if workers.on_ray_train:
        # Imports Ray Train and torch, which take seconds.
        from icce_ray.runtime.ray_train import train

        outcome = train(stage, work, workers, progress, backend)
    else:
        outcome = _work_alone(stage, work, workers, progress)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def attempt(work: Work, device: str, progress: Progress) -> Any:
    """What the work returns; an error that a new try would only meet again is returned too, lest it is tried again."""
    try:
        return work(device=device, progress=progress)
    except (UserError, WorkerError) as error:
        return error


@contextmanager
def relayed_progress(ask: Callable[[], Any], progress: Progress) -> Iterator[None]:
    """While the block runs, pass on what a worker last reported: `ask` returns a reference to it."""
    finished = threading.Event()

    def relay() -> None:
        while not finished.wait(POLL_INTERVAL_S):
            try:
                latest = ray.get(ask(), timeout=POLL_INTERVAL_S)
            except ray.exceptions.RayError:
                continue
            if latest is not None:
                progress.update(*latest)

    thread = threading.Thread(target=relay, name=f"{progress.stage}-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


class StageWorker:
    """The actor. Two calls at a time: one works, one asks how far it is."""

    def __init__(self, stage: str) -> None:
        self.board = ProgressBoard(stage)

    def __repr__(self) -> str:
        return f"{self.board.stage}: worker"

    def work(self, work: Work, device: str) -> Any:
        return attempt(work, device, BoardProgress(self.board.stage, self.board.post))

    def read_progress(self) -> tuple[int, int, str] | None:
        return self.board.read()


def _work_alone(stage: str, work: Work, workers: WorkerResources, progress: Progress) -> Any:
    actor: Any = ray.remote(StageWorker).options(
        num_cpus=worker_cpus(workers),
        num_gpus=min(1.0, workers.gpus_per_worker),
        max_restarts=MAX_RESTARTS,
        max_task_retries=MAX_RESTARTS,
        max_concurrency=2,
    )
    worker = actor.remote(stage)
    device = "cuda" if workers.gpus_per_worker else "cpu"
    try:
        with relayed_progress(worker.read_progress.remote, progress):
            return ray.get(worker.work.options(retry_exceptions=True).remote(work, device))
    except ray.exceptions.RayActorError as error:
        raise WorkerError(
            f"{stage}: its process died {MAX_RESTARTS + 1} times ({' '.join(str(error).split())[:300]}). Out of memory "
            "is the usual cause: give it a machine with more"
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise WorkerError(f"{stage}: ended {MAX_RESTARTS + 1} times: {describe_cause(error)}") from error
    finally:
        ray.kill(worker)
