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

from icce_ray.config import WorkerResources
from icce_ray.errors import InputError, WorkerError
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.workers import MAX_RESTARTS, work_on_workers

pytestmark = pytest.mark.usefixtures("ray_cluster")


def make_work() -> Any:
    """In a function, because workers cannot import this module, and are sent what is not a module's."""

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
    workers = WorkerResources(cpus_per_worker=1.5)
    return work_on_workers("heads", work, workers, progress or Progress("heads", quiet=True))


def processes(folder: Path) -> list[str]:
    """Of each try."""
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
    [("die", r"heads: its process died 4 times .*memory"), ("fault", r"heads: ended 4 times: OSError: the storage is")],
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
