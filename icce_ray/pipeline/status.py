"""The status of a run, seen from any terminal or machine: ``icce-ray status``.

Every few seconds the driver of a run rewrites a small file, ``<output>/runs/progress/<run>.json``, with its stage and
how far that is. `status` reads that file and the manifests, so the output folder is enough. A driver that has not
written for a while was killed.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from icce_ray.errors import BusyError, UserError, describe_cause, find_cause
from icce_ray.runtime.progress import Progress, Reading, format_seconds
from icce_ray.runtime.threads import repeating
from icce_ray.store import Artifact, Folder
from icce_ray.store.run_records import RUNS_FOLDER

PROGRESS_FOLDER = "progress"
WRITE_INTERVAL_S = 5.0
MAX_SILENCE_S = 30.0
"""A driver that has not written for longer is dead, or cannot reach the storage."""
FINISHED, RUNNING, STOPPED, FAILED, INTERRUPTED, WAITING = (
    "finished", "running", "stopped", "failed", "interrupted", "not finished",
)  # fmt: skip


class RunProgress:
    """Context manager that writes the progress of a run to storage. A failed write never harms the run."""

    def __init__(self, output: str, run: str, clock: Callable[[], float] = time.time) -> None:
        self._folder = Folder.at(output) / RUNS_FOLDER / PROGRESS_FOLDER
        self._run, self._clock, self._began = run, clock, clock()
        self._progress: Progress | None = None
        self._writing = threading.Lock()
        """Keeps the writer thread from writing the last stage's progress after the first of the next."""
        self._writer = ExitStack()

    def watch(self, progress: Progress) -> None:
        """Follow the progress of the stage that begins now."""
        is_first, self._progress = self._progress is None, progress
        self.write()
        if is_first:
            self._writer.enter_context(repeating(self.write, WRITE_INTERVAL_S, "icce_ray-status"))

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._writer.close()
        if error is None:
            self.write(FINISHED)
        elif isinstance(error, KeyboardInterrupt):
            self.write(INTERRUPTED)
        elif find_cause(error, BusyError) is None:  # otherwise the file belongs to another job now
            self.write(FAILED, str(find_cause(error, UserError) or describe_cause(error)))

    def write(self, state: str = RUNNING, error: str = "") -> None:
        """Write how far the run is at this moment."""
        if self._progress is None:
            return
        with self._writing, suppress(Exception):
            reading, host, heard = self._progress.read(), socket.gethostname(), self._clock()
            said = Said(self._run, state, reading, host, os.getpid(), self._began, heard, error)
            self._folder.write_bytes(f"{self._run}.json", json.dumps(asdict(said)).encode(), wait=False)


@dataclass(frozen=True)
class Said:
    """The last progress that a driver has written."""

    run: str
    state: str
    reading: Reading
    host: str
    pid: int
    began: float
    """Start of the run in seconds since 1970, by the driver's clock; so is `heard`, the time of writing."""
    heard: float
    error: str

    @classmethod
    def read(cls, root: Folder, run: str) -> Said | None:
        """None if there is none, or none that can be read."""
        try:
            content = json.loads((root / RUNS_FOLDER / PROGRESS_FOLDER).read_bytes(f"{run}.json"))
            reading = Reading(**content.pop("reading"))
            return cls(reading=reading, **content)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass(frozen=True)
class StageStatus:
    """One stage of a run."""

    stage: str
    state: str
    """finished, not finished, or for the stage that the run is at: running, stopped, failed, interrupted."""
    folder: str
    seconds: float | None
    """Duration, if it is finished; then there are `metrics`, too."""
    metrics: dict[str, Any]
    reading: Reading | None
    """Progress, if the run is at this stage."""

    def line(self) -> str:
        said = WAITING if self.seconds is None else f"finished in {self.seconds:.1f} s"
        if self.reading is not None:
            is_running = self.state == RUNNING
            said = self.reading.text() if is_running else f"{self.state} at {replace(self.reading, rate=None).text()}"
        figures = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self.metrics.items()
            if isinstance(value, (str, int, float))
        )
        return f"  {self.stage:<13} {said}  {self.folder}" + (f"\n{'':16}{figures}" if figures else "")


@dataclass(frozen=True)
class RunStatus:
    """How far a run is."""

    run: str
    output: str
    state: str
    """finished, running, stopped (killed), failed, interrupted or not finished."""
    stages: tuple[StageStatus, ...]
    host: str | None = None
    pid: int | None = None
    running_s: float | None = None
    """From its start until its driver last wrote."""
    heard_s_ago: float | None = None
    error: str = ""

    def lines(self) -> list[str]:
        said = f"run {self.run} in {self.output}"
        if self.heard_s_ago is not None:
            ago = f"{format_seconds(self.heard_s_ago)} ago"
            where = f"process {self.pid} on {self.host}"
            said += {
                FINISHED: f": {FINISHED}",
                RUNNING: f": running for {format_seconds(self.running_s or 0)}, {where}; last heard of {ago}",
                STOPPED: f": stopped, last heard of {ago} ({where}); the same command resumes it",
                FAILED: f": failed {ago}: {self.error}",
                INTERRUPTED: f": interrupted {ago}; the same command resumes it",
                WAITING: "",
            }[self.state]
        return [said, *(stage.line() for stage in self.stages)]

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        for stage, values in zip(self.stages, found["stages"], strict=True):
            reading = values.pop("reading")
            values["progress"] = None
            if stage.reading is not None:
                values["progress"] = reading | {"seconds_left": stage.reading.seconds_left}
        return found


def find_status(
    root: Folder, run: str, folders: Mapping[str, Folder], clock: Callable[[], float] = time.time
) -> RunStatus:
    """Find out how far a run is. `folders` are those of its artifacts by stage, in order."""
    artifacts = {stage: Artifact.find(folder) for stage, folder in folders.items()}
    said = Said.read(root, run)
    silence = max(0.0, clock() - said.heard) if said is not None else None
    if all(artifacts.values()):
        state = FINISHED
    elif said is None or silence is None or said.state == FINISHED:  # one of its artifacts was removed since
        state = WAITING
    elif said.state == RUNNING and silence > MAX_SILENCE_S:
        state = STOPPED
    else:
        state = said.state
    reading = said.reading if said is not None and state not in (WAITING, FINISHED) else None
    stages = []
    for stage, folder in folders.items():
        if (artifact := artifacts[stage]) is not None:
            found = StageStatus(stage, FINISHED, folder.uri, artifact.manifest.seconds, artifact.metrics, None)
        elif reading is not None and reading.stage == stage:
            found = StageStatus(stage, state, folder.uri, None, {}, reading)
        else:
            found = StageStatus(stage, WAITING, folder.uri, None, {}, None)
        stages.append(found)
    if said is None:
        return RunStatus(run, root.uri, state, tuple(stages))
    error, running_s = said.error if state == FAILED else "", said.heard - said.began
    return RunStatus(run, root.uri, state, tuple(stages), said.host, said.pid, running_s, silence, error)
