from __future__ import annotations

import os
import subprocess
import sys

import pytest
import ray

from icce_ray.config import ResourcesConfig, WorkerResources, build_config
from icce_ray.errors import ResourceError
from icce_ray.runtime.cluster_resources import available_cpus, check_resources, worker_cpus
from icce_ray.runtime.ray_cluster import connect


def test_connecting_joins_the_ray_that_is_there(ray_cluster: None) -> None:
    node = ray.get_runtime_context().get_node_id()
    connect(ResourcesConfig(num_cpus=1))
    connect(ResourcesConfig())
    assert ray.get_runtime_context().get_node_id() == node
    assert available_cpus() == 4


@pytest.mark.parametrize(
    ("worker", "expected"),
    [
        (WorkerResources(), 4),
        (WorkerResources(num_workers=2), 2),
        (WorkerResources(num_workers=3), 4 / 3),
        (WorkerResources(num_workers=2, cpus_per_worker=0.5), 0.5),
    ],
)
def test_workers_share_a_machine_unless_told_otherwise(
    ray_cluster: None, worker: WorkerResources, expected: float
) -> None:
    assert worker_cpus(worker) == pytest.approx(expected)


def test_resources_are_checked_for_the_stages_that_will_run_only(ray_cluster: None) -> None:
    resources = {"method": {"num_workers": 9}, "embed": {"gpus_per_worker": 1}}
    data = {"images": {"uri": "x"}, "num_clusters": 2, "output": "o", "resources": resources}
    config = build_config(data, "test")
    check_resources(config, ["images", "assign", "report"])
    with pytest.raises(ResourceError, match=r"method\.num_workers: 9 workers, but Ray has 4 CPUs"):
        check_resources(config, ["method"])
    with pytest.raises(ResourceError, match=r"embed: 1 x 1 GPUs asked for, but Ray has 4 CPUs and 0 GPUs"):
        check_resources(config, ["embed"])


def test_a_ray_that_was_joined_is_left_running_without_a_word(ray_cluster: None) -> None:
    address = ray.get_runtime_context().gcs_address
    code = "from icce_ray.runtime.cluster_resources import *; connect(ResourcesConfig()); print(available_cpus())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("4.0", "", 0)
    assert available_cpus() == 4
