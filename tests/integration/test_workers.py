"""Work in a process of its own: what it returns, what is tried again, how often. On Ray Train: test_heads_job.py and
test_assign_job.py."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from icce_ray.config import ResourcesConfig, WorkerResources
from icce_ray.errors import InputError, WorkerError
from icce_ray.runtime import workers
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.workers import run_on_actors, run_tasks, work_on_workers

pytestmark = pytest.mark.usefixtures("ray_cluster")
MAX_RESTARTS = 1


@pytest.fixture(autouse=True)
def _few_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a process, which takes a second to start."""
    monkeypatch.setattr(workers, "MAX_RESTARTS", MAX_RESTARTS)


def make_work() -> Any:
    """In a function: workers cannot import this module, so Ray must send them the function itself."""

    def work(folder: Path, what: str, good_try: int, *, num_threads: int, device: str, progress: Progress) -> Any:
        """Does `what` until it was tried `good_try` times; leaves a file for each try."""
        number = len(list(folder.iterdir())) + 1
        (folder / str(number)).write_text(str(os.getpid()))
        if number >= good_try:
            return number, num_threads, device
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "report":
            progress.update(number, good_try, "on the way")
            while not (folder / "seen").exists():
                time.sleep(0.02)
            return number
        raise {"mistake": InputError("mend this"), "fault": OSError("the storage is away")}[what]

    return work


def run(folder: Path, what: str, good_try: int, progress: Progress | None = None) -> Any:
    work = partial(make_work(), folder, what, good_try)
    resources = ResourcesConfig(method=WorkerResources(cpus_per_worker=1.5))
    return work_on_workers("method", work, resources, progress or Progress("method", quiet=True), num_images=40)


def processes(folder: Path) -> list[str]:
    """The process of each try."""
    return [path.read_text() for path in sorted(folder.iterdir())]


@pytest.mark.parametrize(("what", "num_processes"), [("die", MAX_RESTARTS + 1), ("fault", 1)])
def test_death_and_faults_are_tried_again_with_the_threads_of_the_workers_cpus(
    tmp_path: Path, what: str, num_processes: int
) -> None:
    assert run(tmp_path, what, good_try=MAX_RESTARTS + 1) == (MAX_RESTARTS + 1, 1, "cpu")
    assert len(set(processes(tmp_path))) == num_processes
    assert str(os.getpid()) not in processes(tmp_path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("die", r"method: its process died 2 times .*memory"),
        ("fault", r"method: failed 2 times: OSError: the storage is"),
    ],
)
def test_what_does_not_pass_ends_the_stage(tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(WorkerError, match=message):
        run(tmp_path, what, good_try=9)
    assert len(processes(tmp_path)) == MAX_RESTARTS + 1


def test_the_users_mistake_comes_as_it_is_and_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^mend this$"):
        run(tmp_path, "mistake", good_try=9)
    assert len(processes(tmp_path)) == 1


def test_progress_is_relayed_while_it_works(tmp_path: Path) -> None:
    class Seen(Progress):
        def update(self, done: int, total: int, note: str = "", num_errors: int = 0) -> None:
            assert (done, total, note) == (1, 7, "on the way")
            (tmp_path / "seen").touch()

    assert run(tmp_path, "report", 7, Seen("heads", quiet=True)) == 1


def test_gloo_uses_the_interface_of_an_address_unless_the_user_chose_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from icce_ray.runtime.ray_train import GLOO_INTERFACE, use_interface_of

    monkeypatch.setenv(GLOO_INTERFACE, "chosen")
    use_interface_of("127.0.0.1")
    assert os.environ[GLOO_INTERFACE] == "chosen"
    monkeypatch.delenv(GLOO_INTERFACE)
    use_interface_of("203.0.113.7")  # no interface has it
    assert GLOO_INTERFACE not in os.environ
    use_interface_of("127.0.0.1")
    assert os.environ[GLOO_INTERFACE] == "lo"
    monkeypatch.delenv(GLOO_INTERFACE)


def make_functions() -> Any:
    """In a function for the reason given above."""

    def task(item: int, folder: Path, what: str) -> tuple[int, int]:
        """Fails as `what` says the first time it is called with item 3, or always."""
        marker = folder / "failed"
        if what and item == 3 and (what.startswith("always") or not marker.exists()):
            marker.touch()
            if what.endswith("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"mistake": InputError("mend this"), "fault": OSError("the storage is away")}[what]
        return item * 10, os.getpid()

    class Caller:
        def __init__(self, folder: Path, what: str) -> None:
            self.folder, self.what = folder, what

        def __call__(self, item: int) -> tuple[int, int]:
            return task(item, self.folder, self.what)

    return task, Caller


def results(way: str, folder: Path, what: str) -> dict[int, tuple[int, int]]:
    task, caller = make_functions()
    resources = ResourcesConfig(assign=WorkerResources(num_workers=2, cpus_per_worker=1))
    if way == "tasks":
        found = run_tasks("assign", task, range(6), (folder, what), resources=resources, num_images=40)
    else:
        make, progress = partial(caller, folder, what), Progress("assign", quiet=True)
        found = run_on_actors("assign", make, range(6), resources=resources, progress=progress, num_images=40)
    return dict(found)


@pytest.mark.parametrize("way", ["tasks", "actors"])
def test_each_item_has_one_result_though_a_process_dies(tmp_path: Path, way: str) -> None:
    found = results(way, tmp_path, "die")
    assert (tmp_path / "failed").exists()
    assert {item: value for item, (value, _) in found.items()} == {item: item * 10 for item in range(6)}
    assert os.getpid() not in {process for _, process in found.values()}
    assert way == "tasks" or len({process for _, process in found.values()}) <= 3, "two actors, one of them twice"


@pytest.mark.parametrize("way", ["tasks", "actors"])
@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("mistake", InputError, r"^mend this$"),
        ("fault", WorkerError, r"assign: .* OSError: the storage is away"),
        ("always die", WorkerError, "assign: a worker failed, or died 2 times"),
    ],
)
def test_errors_of_tasks_and_actors_reach_the_driver(
    tmp_path: Path, way: str, what: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        results(way, tmp_path, what)


def test_results_come_in_the_order_of_the_items_if_asked_for(tmp_path: Path) -> None:
    def first_is_last(item: int) -> int:
        (tmp_path / str(item)).touch()
        while item == 0 and not (tmp_path / "1").exists():
            time.sleep(0.02)
        return item

    resources = ResourcesConfig()
    found = run_tasks("sample", first_is_last, range(5), resources=resources, num_images=40, in_order=True)
    assert list(found) == [(item, item) for item in range(5)]
