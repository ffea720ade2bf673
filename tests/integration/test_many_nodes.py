"""The whole pipeline on several hosts that share nothing but a bucket, with a host lost in each of two stages,
against an undisturbed run on this machine; see many_nodes.py for what is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from icce_ray import run_pipeline
from icce_ray.config import Config

from .hosts import can_isolate, in_namespaces
from .many_nodes import AT_WORK, KILLED_IN, NUM_CLUSTERS, NUM_HOSTS, NUM_IMAGES, SETTINGS, images, is_at_work, made_by

pytestmark = pytest.mark.slow

TIMEOUT_S = 900


@pytest.fixture(scope="module")
def disturbed() -> dict[str, Any]:
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
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same images and settings in this process, without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "photos").mkdir()
    for name, content in images():
        (folder / "photos" / name).write_bytes(content)
    places = {"images": {"uri": str(folder / "photos")}, "output": str(folder / "out")}
    config = Config.model_validate(SETTINGS | places | {"resources": {}})
    return made_by(config, run_pipeline(config, quiet=True).to_json())


def test_the_work_lands_on_all_hosts(disturbed: dict[str, Any]) -> None:
    on = {stage: {host for name, host in disturbed["worked"] if name == stage} for stage in AT_WORK}
    assert len(on["embed"]) >= NUM_HOSTS, on
    assert len(on["method"]) > NUM_HOSTS, on  # with the one that joined after a loss
    assert "head" not in set.union(*on.values())


def test_every_image_is_assigned_once_and_the_report_lies_in_the_bucket(disturbed: dict[str, Any]) -> None:
    rows = disturbed["rows"]
    assert rows["image_id"] == list(range(NUM_IMAGES))
    assert set(rows["cluster"]) == set(range(NUM_CLUSTERS))
    assert "<html" in disturbed["report"]
    assert disturbed["left_behind"] == []
    assert disturbed["with_a_secret"] == []


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
    assert any(name.startswith("checkpoints/") for name in begun["method"])


def test_hosts_lost_in_every_stage_change_nothing(undisturbed: dict[str, Any], disturbed: dict[str, Any]) -> None:
    assert {name: disturbed[name] for name in undisturbed} == undisturbed


def test_the_heads_were_trained_by_two_workers_and_no_epoch_is_told_twice(disturbed: dict[str, Any]) -> None:
    assert disturbed["num_workers"] == NUM_HOSTS
    assert [epoch["epoch"] for epoch in disturbed["history"]] == list(range(1, SETTINGS["heads"]["num_epochs"] + 1))
    assert disturbed["epochs_told"] == disturbed["history"]


def test_status_told_from_elsewhere_how_far_the_run_was(disturbed: dict[str, Any]) -> None:
    told = disturbed["status_at_kills"]
    assert {status["state"] for status in told} == {"running"}
    at = [next(stage["stage"] for stage in status["stages"] if stage["state"] == "running") for status in told]
    assert at == list(KILLED_IN)
