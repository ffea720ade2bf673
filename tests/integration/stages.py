"""The first stages as the pipeline runs them, without the later ones; and who works for them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from icce_ray.config import Config
from icce_ray.pipeline import run as pipeline
from icce_ray.runtime import ray_cluster
from icce_ray.runtime.progress import Progress
from icce_ray.store import Artifact

from .hosts import descendants, process_table, title


def run_embed(config: Config) -> Artifact:
    """Plan, list and embed; what is finished is used. Returns the ``embed`` artifact."""
    return run_until("embed", config)["embed"]


def run_until(last: str, config: Config) -> dict[str, Artifact]:
    """The artifacts of the stages up to the one named `last`; what is finished is used."""
    planned = pipeline.plan(config)
    artifacts: dict[str, Artifact] = {}
    for step in planned:
        artifacts[step.name] = step.artifact or pipeline.run_stage(config, step, artifacts, True)
        if step.name == last:
            break
    return artifacts


def artifact(config: Config, stage: str) -> Artifact:
    """The finished artifact of a stage of the run with this config."""
    found = next(step.artifact for step in pipeline.plan(config) if step.name == stage)
    assert found is not None
    return found


@contextmanager
def without_ray() -> Iterator[None]:
    """Runs in this block use no Ray unless they ask for it, although the tests of this process share one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_cluster, "_started_here", True)
        yield


def wait_for(condition: Callable[[], bool], timeout_s: float = 300.0, poll_s: float = 0.05) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(poll_s)


def workers(task: str) -> list[int]:
    """Processes of this test's Ray that are at work on `task`."""
    found = {pid: title(pid) for pid in descendants(os.getpid(), process_table())}
    return [pid for pid, what in found.items() if what.startswith("ray::") and task in what]


def two_workers_in_turn(monkeypatch: pytest.MonkeyPatch, job: Any, *expected: Any) -> list[Any]:
    """Makes a job run the two processes of Ray Train one after the other in this one, the first last, in place of both
    at once. `expected`: the stage, `max_workers` and `backend` that it asks for. Returns what the processes return, as
    they end."""
    import torch.distributed as dist

    outcomes: list[Any] = []

    def work_on_workers(stage: str, work: Any, *_: Any, max_workers: int, backend: str, **others: Any) -> Any:
        assert (stage, max_workers, backend) == expected
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        for rank in (1, 0):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            outcomes.append(work(num_threads=1, device="cpu", progress=Progress(stage, quiet=True)))
        return outcomes[-1]

    monkeypatch.setattr(job, "work_on_workers", work_on_workers)
    return outcomes
