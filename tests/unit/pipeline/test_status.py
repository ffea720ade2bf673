"""What is said of a run while it goes on, after it ended, and after it was killed; on a real folder, with a clock that
the tests turn."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from icce_ray import cli
from icce_ray.errors import BusyError, InputError, WorkerError
from icce_ray.pipeline.status import MAX_SILENCE_S, PROGRESS_FOLDER, RunProgress, RunStatus, find_status
from icce_ray.runtime.progress import Progress
from icce_ray.store import ArtifactWriter, Folder
from icce_ray.store.run_records import RUNS_FOLDER

RUN = "abc"
STAGES = ("images", "embed", "heads")


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told(tmp_path: Path, clock: Clock) -> RunProgress:
    return RunProgress(str(tmp_path), RUN, clock)


def folders(root: Path) -> dict[str, Folder]:
    return {stage: Folder.at(root) / stage / f"{stage}-0" for stage in STAGES}


def commit(root: Path, *stages: str) -> None:
    for stage in stages:
        writer = ArtifactWriter(folders(root)[stage])
        writer.commit(stage=stage, fingerprint="0", inputs={}, config={}, metrics={"anmi": 0.81234}, seconds=12.34)


def status(root: Path, clock: Clock) -> RunStatus:
    return find_status(Folder.at(root), RUN, folders(root), clock)


def test_a_stage_under_way_tells_its_progress_rate_time_left_and_errors(
    tmp_path: Path, clock: Clock, told: RunProgress
) -> None:
    commit(tmp_path, "images")
    progress = Progress("embed", quiet=True, clock=clock)
    with told:
        progress.update(1000, 5000)
        clock.now += 10
        progress.update(1500, 5000, num_errors=3)
        told.watch(progress)
        clock.now += 2
        assert status(tmp_path, clock).lines()[0].endswith("last heard of 2 s ago")
        found = status(tmp_path, clock)
    assert (found.state, [stage.state for stage in found.stages]) == (
        "running",
        ["finished", "running", "not finished"],
    )
    # What a resumed run had is not counted: 500 in 10 s.
    assert "  embed         1,500/5,000 images, 50/s, 1 min 10 s left, 3 errors  " in found.lines()[2]
    stage = found.to_json()["stages"][1]
    assert stage["progress"]["rate"] == pytest.approx(50)
    assert stage["progress"]["seconds_left"] == pytest.approx(70)
    assert stage["progress"]["num_errors"] == 3


def test_the_rate_is_that_of_the_last_minute(clock: Clock) -> None:
    progress = Progress("embed", quiet=True, clock=clock)
    progress.update(0, 100_000)
    for _ in range(100):  # slow for a long time
        clock.now += 10
        progress.update(0, 100_000)
    for second in range(1, 91):
        clock.now += 1
        progress.update(100 * second, 100_000)
    assert progress.read().rate == pytest.approx(100)
    clock.now += 90  # and nothing since
    assert progress.read().rate == pytest.approx(60 * 100 / 150)


def test_a_stage_that_counts_nothing_has_no_rate_and_no_time_left(clock: Clock) -> None:
    progress = Progress("embed", quiet=True, clock=clock)
    assert (progress.read().done, progress.read().text()) == (None, "nothing counted yet")
    progress.update(5, 10)
    clock.now += 3
    assert (progress.read().rate, progress.read().seconds_left) == (None, None)
    assert progress.read().text() == "5/10 images"


def test_a_run_that_was_killed_is_told_by_its_silence(tmp_path: Path, clock: Clock, told: RunProgress) -> None:
    progress = Progress("embed", quiet=True, clock=clock)
    progress.update(10, 50)
    told._progress = progress
    told.write()  # and no more: its process is gone
    clock.now += MAX_SILENCE_S
    assert status(tmp_path, clock).state == "running"
    clock.now += 155
    found = status(tmp_path, clock)
    assert found.state == "stopped"
    assert "stopped, last heard of 3 min 5 s ago" in found.lines()[0]
    assert "stopped at 10/50 images" in found.lines()[2]
    assert found.to_json()["heard_s_ago"] == 185


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (WorkerError("embed: workers died"), "failed", "failed 1 min 0 s ago: embed: workers died"),
        (InputError("images.uri: nothing there"), "failed", "failed 1 min 0 s ago: images.uri: nothing there"),
        (KeyboardInterrupt(), "interrupted", "interrupted 1 min 0 s ago"),
        # Another job works at it, and what is told is told by that job.
        (BusyError("another"), "running", "running for 0 s"),
    ],
)
def test_how_a_run_ended_is_told(
    tmp_path: Path, clock: Clock, told: RunProgress, error: BaseException, state: str, said: str
) -> None:
    def end() -> None:
        with told:
            told.watch(Progress("embed", quiet=True, clock=clock))
            raise error

    with pytest.raises(type(error)):
        end()
    clock.now += 20 if state == "running" else 60
    found = status(tmp_path, clock)
    assert found.state == state
    assert said in found.lines()[0]


def test_a_finished_run_is_finished_whatever_was_heard_of_it(tmp_path: Path, clock: Clock, told: RunProgress) -> None:
    with told:
        told.watch(Progress("heads", quiet=True, clock=clock))
        commit(tmp_path, *STAGES)
    clock.now += 10_000
    found = status(tmp_path, clock)
    assert (found.state, {stage.state for stage in found.stages}) == ("finished", {"finished"})
    assert "finished in 12.3 s" in found.lines()[1]
    assert "anmi 0.8123" in found.lines()[1]


def test_a_run_that_has_not_begun_and_one_of_which_a_result_was_removed_are_not_finished(
    tmp_path: Path, clock: Clock, told: RunProgress
) -> None:
    assert status(tmp_path, clock).state == "not finished"
    with told:
        told.watch(Progress("heads", quiet=True, clock=clock))
        commit(tmp_path, *STAGES)
    folders(tmp_path)["embed"].remove("manifest.json")
    found = status(tmp_path, clock)
    assert (found.state, found.stages[1].state) == ("not finished", "not finished")


def test_the_file_is_written_on_while_a_stage_says_nothing(
    tmp_path: Path, clock: Clock, told: RunProgress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icce_ray.pipeline.status.WRITE_INTERVAL_S", 0.01)
    with told:
        told.watch(Progress("embed", quiet=True, clock=clock))
        clock.now += 1000
        for _ in range(6000):
            if status(tmp_path, clock).heard_s_ago == 0:
                break
            threading.Event().wait(0.01)
        assert status(tmp_path, clock).state == "running"


def test_storage_that_fails_costs_the_watcher_only(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / RUNS_FOLDER).write_text("no folder can be here")
    with RunProgress(str(tmp_path), RUN, clock) as told:
        told.watch(Progress("embed", quiet=True, clock=clock))
    (tmp_path / RUNS_FOLDER).unlink()
    assert status(tmp_path, clock).state == "not finished"


def test_a_file_of_another_version_is_left_alone(tmp_path: Path, clock: Clock) -> None:
    place = tmp_path / RUNS_FOLDER / PROGRESS_FOLDER
    place.mkdir(parents=True)
    for content in ("{", '{"run": "abc"}', '{"reading": {"pages": 3}}'):
        (place / f"{RUN}.json").write_text(content)
        assert status(tmp_path, clock).state == "not finished"


def test_the_command_prints_lines_and_json(
    tmp_path: Path, told: RunProgress, capsys: pytest.CaptureFixture[str]
) -> None:
    record: dict[str, Any] = {"run": RUN, "stages": {stage: f"{stage}-0" for stage in STAGES}, "config": {}}
    Folder.at(tmp_path / RUNS_FOLDER).write_bytes(f"{RUN}.json", json.dumps(record).encode())
    commit(tmp_path, "images")
    told._progress = Progress("embed", quiet=True)
    told._progress.update(1, 2)
    told.write()
    assert cli.main(["status", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"run {RUN} in {tmp_path}: stopped, last heard of ")
    found = json.loads(printed[-1])
    assert [(run["run"], run["state"]) for run in found] == [(RUN, "stopped")]
    assert [stage["state"] for stage in found[0]["stages"]] == ["finished", "stopped", "not finished"]
    assert found[0]["stages"][1]["progress"]["done"] == 1
