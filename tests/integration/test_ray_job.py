"""`ray job submit`, as in the README, to a head that was started by `ray start`."""

from __future__ import annotations

import json
import os
import secrets
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
from typing import Any

import numpy as np
import pytest

from .hosts import Host, free_port, process_table
from .stages import wait_for
from .test_run import NUM_CLASSES, NUM_IMAGES, SETTINGS, STAGE_NAMES, read_assignments

pytestmark = pytest.mark.slow

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
JOB = ["python", "-m", "icce_ray.run", "run.yaml"]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """The environment of the head's users: a home with the token, and the address of the dashboard."""
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
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    with (home / "head.log").open("wb") as log:
        head = subprocess.Popen([*RAY, "start", "--head", "--block", *options], env=there, stdout=log, stderr=log)

    def answers() -> bool:
        assert head.poll() is None, (home / "head.log").read_text()
        try:
            urllib.request.urlopen(f"{there['RAY_API_SERVER_ADDRESS']}/api/version", timeout=5)
        except urllib.error.HTTPError:  # it asks for the token
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


def call(path: str, environment: dict[str, str], content: dict[str, Any] | None = None) -> Any:
    """Ray's REST API of jobs: GET, or POST with content. A command would take seconds to import Ray."""
    token = (Path(environment["HOME"]) / ".ray" / "auth_token").read_text()
    request = urllib.request.Request(
        f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/{path}",
        data=None if content is None else json.dumps(content).encode(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def ended(name: str, environment: dict[str, str]) -> dict[str, Any]:
    """What Ray says of a job once it has ended."""
    wait_for(lambda: call(name, environment)["status"] in ("STOPPED", "SUCCEEDED", "FAILED"))
    found: dict[str, Any] = call(name, environment)
    return found


def write_run(folder: Path) -> Path:
    """A folder that holds only a config; ready-made embeddings and the output are beside it."""
    classes = np.arange(NUM_IMAGES) % NUM_CLASSES
    features = np.random.default_rng(0).standard_normal((NUM_IMAGES, 8)) + 9 * np.eye(8)[classes]
    np.save(folder / "features.npy", features.astype(np.float32))
    places = {"embeddings": {"uri": str(folder / "features.npy")}, "output": str(folder / "out")}
    sections = {name: section for name, section in SETTINGS.items() if name != "embed"}
    sections["consensus"] = {"methods": ["vote"]}
    place = folder / "place"
    place.mkdir()
    (place / "run.yaml").write_text(json.dumps(places | sections))
    return place


def test_a_job_that_was_stopped_goes_on_by_the_same_command(tmp_path: Path, environment: dict[str, str]) -> None:
    place = write_run(tmp_path)

    command = f"cd {place} && {' '.join(JOB)} --set heads.num_epochs=2000"
    call("", environment, {"entrypoint": command, "submission_id": "first"})
    wait_for(lambda: any(tmp_path.glob("out/method/*/metrics.jsonl")))
    assert call("first/stop", environment, {})["stopped"]
    assert ended("first", environment)["status"] == "STOPPED"
    assert not any(tmp_path.glob("out/method/*/manifest.json"))

    second = subprocess.run(
        [*RAY, "job", "submit", "--working-dir", ".", "--submission-id", "second", "--", *JOB, "--json"],
        cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert second.returncode == 0, second.stdout + second.stderr
    assert ended("second", environment)["driver_exit_code"] == 0
    result = json.loads(next(line for line in second.stdout.splitlines() if line.startswith('{"run"')))
    assert result["finished_before"] == STAGE_NAMES[: STAGE_NAMES.index("method")]
    assert (result["num_images"], result["num_clusters"]) == (NUM_IMAGES, NUM_CLASSES)
    assert read_assignments(result["assignments"])["image_id"] == list(range(NUM_IMAGES))


def test_the_drivers_exit_code_tells_a_mistake(tmp_path: Path, environment: dict[str, str]) -> None:
    command = f"cd {write_run(tmp_path)} && {' '.join(JOB)} --set num_clusters=1000"
    call("", environment, {"entrypoint": command, "submission_id": "mistaken"})
    job = ended("mistaken", environment)
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 2)
    printed = call("mistaken/logs", environment)["logs"]
    assert "num_clusters: 1000 clusters asked for, but there are only 120" in printed
    assert "Traceback" not in printed
