"""Work that runs in the calling process because the run is small."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from icce_ray.config import ResourcesConfig
from icce_ray.errors import InputError, WorkerError
from icce_ray.runtime import ray_cluster
from icce_ray.runtime.machine import usable_cpus
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import MAX_IMAGES_HERE, runs_here
from icce_ray.runtime.workers import MAX_RESTARTS, run_on_actors, run_tasks, work_on_workers

RESOURCES = ResourcesConfig()


@pytest.fixture(autouse=True)
def _unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray, although other tests of this process may have started one."""
    monkeypatch.setattr(ray_cluster, "is_connected", lambda: False)
    monkeypatch.setattr(ray_cluster, "_started_here", False)


def test_a_run_is_here_if_it_is_small_asks_for_nothing_and_joins_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs_here(RESOURCES, MAX_IMAGES_HERE)
    assert not runs_here(RESOURCES, MAX_IMAGES_HERE + 1)
    for asked in (
        {"num_cpus": 2},
        {"ray_address": "auto"},
        {"embed": {"num_workers": 2}},
        {"method": {"gpus_per_worker": 1}},
    ):
        assert not runs_here(ResourcesConfig.model_validate(asked), 1)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert not runs_here(RESOURCES, 1)
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(ray_cluster, "is_connected", lambda: True)
    assert not runs_here(RESOURCES, 1)
    monkeypatch.setattr(ray_cluster, "_started_here", True)  # by an earlier stage of this run
    assert runs_here(RESOURCES, 1)


def test_inside_run_here_everything_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "is_connected", lambda: True)
    asked = ResourcesConfig.model_validate({"method": {"num_workers": 2}})
    with ray_cluster.run_here(3):
        assert runs_here(asked, MAX_IMAGES_HERE + 1)
        assert ray_cluster.threads_here() == 3
    assert not runs_here(asked, 1)
    assert ray_cluster.threads_here() == usable_cpus()


class Seen(Progress):
    def __init__(self) -> None:
        super().__init__("method", quiet=True)
        self.updates: list[tuple[int, int, str]] = []

    def update(self, done: int, total: int, note: str = "", num_errors: int = 0) -> None:
        self.updates.append((done, total, note))


def run_here(work: Callable[..., Any], progress: Progress) -> Any:
    return work_on_workers("method", work, RESOURCES, progress, num_images=40)


def test_work_gets_all_cpus_and_reports_its_progress() -> None:
    def work(*, num_threads: int, device: str, progress: Progress) -> tuple[int, str, int]:
        progress.update(3, 5, "on the way")
        return num_threads, device, os.getpid()

    progress = Seen()
    assert run_here(work, progress) == (usable_cpus(), "cpu", os.getpid())
    assert progress.updates == [(3, 5, "on the way")]


@pytest.mark.parametrize(
    ("error", "kind", "num_tries"),
    [
        (InputError("mend this"), InputError, 1),
        (OSError("the storage is away"), WorkerError, MAX_RESTARTS + 1),
        (KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt, 1),
    ],
)
def test_only_faults_that_may_pass_are_tried_again(
    error: BaseException, kind: type[BaseException], num_tries: int
) -> None:
    tries = []

    def work(**_: Any) -> None:
        tries.append(1)
        raise error

    with pytest.raises(kind, match=str(error)):
        run_here(work, Seen())
    assert len(tries) == num_tries


def test_a_fault_that_passes_ends_nothing() -> None:
    faults = [OSError("away"), OSError("away")]

    def work(**_: Any) -> str:
        if faults:
            raise faults.pop()
        return "done"

    assert run_here(work, Seen()) == "done"


def test_tasks_and_actors_are_called_in_order_one_by_one() -> None:
    def add(item: int, more: int) -> int:
        return item + more

    assert list(run_tasks("count", add, [1, 2], (10,), resources=RESOURCES, num_images=40)) == [(1, 11), (2, 12)]

    class Adder:
        def __init__(self, start: int) -> None:
            self.total = start

        def __call__(self, item: int) -> int:
            self.total += item
            return self.total

    found = run_on_actors("assign", partial(Adder, 100), [1, 2, 3], resources=RESOURCES, progress=Seen(), num_images=40)
    assert list(found) == [(1, 101), (2, 103), (3, 106)]


def test_importing_the_workers_imports_no_ray() -> None:
    import subprocess

    code = "import sys, icce_ray.runtime.workers; assert 'ray' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
