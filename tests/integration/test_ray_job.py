"""`ray job submit`, as the README says it, to a head that was started by `ray start`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from .hosts import Host, free_port, process_table
from .stages import wait_for
from .test_run import NUM_CLASSES, NUM_IMAGES, SETTINGS, STAGE_NAMES, read_assignments

pytestmark = pytest.mark.slow

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
JOB = ["python", "-m", "icce_ray.run", "run.yaml"]
JOB_INFO = "import sys; from ray.job_submission import *; print(JobSubmissionClient().get_job_info(sys.argv[1]).{})"


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of whoever uses the head: its user's home, with the token that Ray made, and the address of its dashboard."""
    home = Path(tempfile.mkdtemp(prefix="ij-", dir="/tmp"))  # Ray's sockets allow no long paths
    port, dashboard = free_port(), free_port()
    there = os.environ | {
        "HOME": str(home),
        "ICCE_CACHE": str(home / "cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
    }
    options = [
        f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2", f"--temp-dir={home}/ray",
        "--object-store-memory=200000000", "--min-worker-port=0", "--max-worker-port=0",
        "--dashboard-agent-listen-port=0", "--disable-usage-stats",
    ]  # fmt: skip
    subprocess.run([*RAY, "get-auth-token", "--generate"], env=there, capture_output=True, check=True)
    with (home / "head.log").open("wb") as log:
        head = subprocess.Popen([*RAY, "start", "--head", "--block", *options], env=there, stdout=log, stderr=log)

    def answers() -> bool:
        assert head.poll() is None, (home / "head.log").read_text()
        try:
            urllib.request.urlopen(f"{there['RAY_API_SERVER_ADDRESS']}/api/version", timeout=5)
        except urllib.error.HTTPError:  # it wants a token
            return True
        except OSError:
            return False
        return True

    try:
        wait_for(answers)
        yield there
    finally:
        # Asked to end, it takes half a minute.
        for pid in Host("head", "127.0.0.1", head, there, home).processes(process_table()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(home, ignore_errors=True)


def submit(
    name: str, folder: Path, environment: dict[str, str], *settings: str, wait: bool = True
) -> subprocess.CompletedProcess[str]:
    options = ["--working-dir", ".", "--submission-id", name, *([] if wait else ["--no-wait"])]
    return subprocess.run(
        [*RAY, "job", "submit", *options, "--", *JOB, *settings],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def told(name: str, what: str, environment: dict[str, str]) -> str:
    """What Ray says of a job, such as its driver's exit code."""
    command = [sys.executable, "-c", JOB_INFO.format(what), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write_run(folder: Path) -> Path:
    """A folder with nothing but a config; ready-made embeddings and the output lie beside it."""
    classes = np.arange(NUM_IMAGES) % NUM_CLASSES
    features = np.random.default_rng(0).standard_normal((NUM_IMAGES, 8)) + 9 * np.eye(8)[classes]
    np.save(folder / "features.npy", features.astype(np.float32))
    places = {"embeddings": {"uri": str(folder / "features.npy")}, "output": str(folder / "out")}
    sections = {name: section for name, section in SETTINGS.items() if name != "embed"}
    place = folder / "place"
    place.mkdir()
    (place / "run.yaml").write_text(json.dumps(places | sections))
    return place


def test_a_job_that_was_stopped_goes_on_by_the_same_command(tmp_path: Path, environment: dict[str, str]) -> None:
    place = write_run(tmp_path)

    first = submit("first", place, environment, "--set", "heads.num_epochs=2000", wait=False)
    assert first.returncode == 0, first.stderr
    wait_for(lambda: any(tmp_path.glob("out/heads/*/metrics.jsonl")))
    stopped = subprocess.run([*RAY, "job", "stop", "first"], env=environment, capture_output=True, text=True)
    assert stopped.returncode == 0, stopped.stderr
    assert told("first", "status.name", environment) == "STOPPED"
    assert not any(tmp_path.glob("out/heads/*/manifest.json"))

    second = submit("second", place, environment, "--json")
    assert second.returncode == 0, second.stdout + second.stderr
    assert told("second", "driver_exit_code", environment) == "0"
    result = json.loads(next(line for line in second.stdout.splitlines() if line.startswith('{"run"')))
    assert result["finished_before"] == STAGE_NAMES[: STAGE_NAMES.index("method")]
    assert (result["num_images"], result["num_clusters"]) == (NUM_IMAGES, NUM_CLASSES)
    assert read_assignments(result["assignments"])["image_id"] == list(range(NUM_IMAGES))


def test_the_drivers_exit_code_tells_a_mistake(tmp_path: Path, environment: dict[str, str]) -> None:
    done = submit("mistaken", write_run(tmp_path), environment, "--set", "num_clusters=1000")
    assert done.returncode == 1
    assert told("mistaken", "driver_exit_code", environment) == "2"
    assert "1000" in done.stdout
    assert "Traceback" not in done.stdout
