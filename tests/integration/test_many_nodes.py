"""The whole pipeline on several hosts that share nothing but a bucket, undisturbed and with a host lost in each of five
stages; see many_nodes.py for what is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from .hosts import can_isolate, in_namespaces
from .many_nodes import AT_WORK, KILLED_IN, NUM_CLUSTERS, NUM_IMAGES, is_at_work

pytestmark = pytest.mark.slow

TIMEOUT_S = 900


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What `many_nodes` saw: on hosts with networks of their own where this machine lets us make them."""
    isolated = can_isolate() and os.environ.get("ICCE_TEST_HOSTS") != "processes"
    script = [sys.executable, "-m", "tests.integration.many_nodes", "isolated" if isolated else "processes"]
    command = in_namespaces(script) if isolated else script
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["isolated"] == isolated
    return found


@pytest.fixture(scope="module")
def undisturbed(seen: dict[str, Any]) -> dict[str, Any]:
    return dict(seen["runs"][0])


@pytest.fixture(scope="module")
def disturbed(seen: dict[str, Any]) -> dict[str, Any]:
    return dict(seen["runs"][1])


def test_the_work_lands_on_all_hosts(undisturbed: dict[str, Any]) -> None:
    hosts = {f"host-{number}" for number in range(3)}
    on = {stage: {host for name, host in undisturbed["worked"] if name == stage} for stage in AT_WORK}
    assert on["embed"] == on["neighbors"] == on["assign"] == hosts
    assert len(on["heads"]) == 2  # workers
    assert len(on["consensus"]) >= 1  # a task at a time
    assert "head" not in set.union(*on.values())


def test_every_image_is_assigned_once(undisturbed: dict[str, Any]) -> None:
    rows = undisturbed["rows"]
    assert rows["image_id"] == list(range(NUM_IMAGES))
    assert set(rows["cluster"]) == set(range(NUM_CLUSTERS))


def test_a_host_at_work_was_killed_in_each_stage(disturbed: dict[str, Any]) -> None:
    kills = disturbed["kills"]
    assert [kill["stage"] for kill in kills] == list(KILLED_IN)
    assert len({kill["host"] for kill in kills}) == len(kills)
    for kill in kills:
        assert is_at_work(kill["task"], kill["stage"]), kill
        assert kill["unfinished"], kill
        assert kill["task_is_dead"], kill
        assert kill["raylet_is_dead"], kill
    begun = {kill["stage"]: kill["results_before"] for kill in kills}
    assert any(name.endswith(".parquet") for name in begun["embed"])
    assert any(name.startswith("checkpoints/") for name in begun["heads"])


def test_hosts_lost_in_every_stage_change_nothing(undisturbed: dict[str, Any], disturbed: dict[str, Any]) -> None:
    assert disturbed["rows"] == undisturbed["rows"]
    assert disturbed["result"]["anmi"] == undisturbed["result"]["anmi"]
    for name in ("embed", "consensus"):
        parts = [
            {part: checksum for part, checksum in run["checksums"].items() if part.startswith(f"{name}/part-")}
            for run in (undisturbed, disturbed)
        ]
        assert parts[0] == parts[1], name


def test_status_told_from_elsewhere_how_far_the_run_was(disturbed: dict[str, Any]) -> None:
    told = disturbed["status_at_kills"]
    assert {status["state"] for status in told} == {"running"}
    at = [next(stage["stage"] for stage in status["stages"] if stage["state"] == "running") for status in told]
    assert at == list(KILLED_IN)
