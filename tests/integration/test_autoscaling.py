"""A Ray that grows by itself: it starts with a head that has no CPUs, and its autoscaler (version 2, with Ray's own
provider of pretended machines) may add one machine of three CPUs and two of two."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

from .hosts import REPOSITORY, Hosts, process_table, title

pytestmark = pytest.mark.slow

PROVIDER = {
    # Under its own name, Ray would look for defaults in a file that its package lacks.
    "type": "external",
    "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
    "head_node_id": FAKE_HEAD_NODE_ID,
    "launch_multiple": True,
    "use_node_id_as_ip": True,
    "disable_node_updaters": True,
    "disable_launch_config_check": True,
}
NODE_TYPES = {
    FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    **{
        name: {
            "resources": {"CPU": cpus, "object_store_memory": 100_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": max_workers,
        }
        for name, cpus, max_workers in (("large", 3, 1), ("small", 2, 2))
    },
}
EMPTY_LISTS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip


@pytest.fixture(scope="module")
def growing() -> Iterator[Hosts]:
    with Hosts(isolated=False) as hosts:
        config = {
            "cluster_name": "growing",
            "max_workers": 3,
            "provider": PROVIDER | {"gcs_address": f"127.0.0.1:{hosts.port}"},
            "available_node_types": NODE_TYPES,
            "head_node_type": FAKE_HEAD_NODE_TYPE,
            "idle_timeout_minutes": 5,
            "upscaling_speed": 1.0,
            "auth": {},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            **{key: [] for key in EMPTY_LISTS},
        }
        path = hosts.folder / "autoscaling.json"
        path.write_text(json.dumps(config))
        hosts.environment |= {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
        }
        hosts.start("head", num_cpus=0, options=[f"--autoscaling-config={path}"])
        hosts.wait_until_joined()
        yield hosts


def num_machines(hosts: Hosts) -> int:
    """Number of machines that the autoscaler has started."""
    table = process_table()
    raylets = {pid for pid in hosts.head.processes(table) if "/raylet/raylet " in title(pid)}
    # One that starts a worker is there twice until its child has become the worker.
    return sum(table[pid] not in raylets for pid in raylets) - 1


def write_config(hosts: Hosts, folder: Path, resources: dict[str, Any]) -> Path:
    features = np.random.default_rng(0).standard_normal((300, 8)) + np.repeat(np.eye(3, 8) * 9, 100, axis=0)
    np.save(folder / "features.npy", features.astype(np.float32))
    settings = {
        "embeddings": {"uri": str(folder / "features.npy")},
        "num_clusters": 3,
        "output": str(folder / "out"),
        "method": "kmeans",
        "classifier": {"num_iterations": 50},
        "resources": {"ray_address": f"127.0.0.1:{hosts.port}", **resources},
    }
    (folder / "run.yaml").write_text(json.dumps(settings))
    return folder / "run.yaml"


def run_on_head(hosts: Hosts, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = {key: value for key, value in hosts.head.environment.items() if key != "TMPDIR"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_a_stage_waits_until_its_machine_is_there(growing: Hosts) -> None:
    assert num_machines(growing) == 0
    code = (
        "import sys; from icce_ray.runtime.cluster_resources import *; from icce_ray.config import *\n"
        "worker = WorkerResources(num_workers=1, cpus_per_worker=3)\n"
        "resources = ResourcesConfig(ray_address=sys.argv[1], neighbors=worker)\n"
        "connect(resources)\n"
        "wait_for_machines(resources, 'neighbors', print)\n"
        "print(available_cpus())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"127.0.0.1:{growing.port}"],
        env=growing.head.environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["waits for machines for 1 x 3 CPUs", "3.0"], done.stderr


def test_stages_finish_on_machines_that_were_not_there(growing: Hosts, tmp_path: Path) -> None:
    before = num_machines(growing)
    path = write_config(growing, tmp_path, {"method": {"num_workers": 2, "cpus_per_worker": 2}})
    code = (
        "import sys; from icce_ray.config import load_config; from tests.integration.stages import run_until\n"
        "print(run_until('method', load_config(sys.argv[1]))['method'].read_array('label_matrix.npy').shape[1])"
    )
    done = run_on_head(growing, REPOSITORY, "-c", code, str(path))
    assert (done.stdout, done.returncode) == ("300\n", 0), done.stderr
    assert (before, num_machines(growing)) == (1, 2)


def test_what_no_machines_can_hold_is_refused_before_anything_starts(growing: Hosts, tmp_path: Path) -> None:
    write_config(growing, tmp_path, {"method": {"num_workers": 3, "cpus_per_worker": 3}})
    done = run_on_head(growing, tmp_path, "-m", "icce_ray.run", "run.yaml")
    assert done.returncode == 2, done.stderr
    assert "resources.method: 3 x 3 CPUs asked for, but Ray has" in done.stderr.splitlines()[-1]
    assert "Its autoscaler has no machines for that" in done.stderr.splitlines()[-1]
    assert "waits for machines" not in done.stderr
    assert not list(tmp_path.glob("out/images/*/manifest.json"))
