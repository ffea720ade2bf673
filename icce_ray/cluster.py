"""Attach to Ray, or start it here, quietly; how many CPUs a worker gets; whether what the config asks for exists.

A Ray that was running is joined and left running. A Ray that we started ends with this process.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from icce_ray.config import Config, ResourcesConfig, WorkerResources
from icce_ray.errors import ResourceError

MAX_OBJECT_STORE_BYTES = 2_000_000_000
CONNECT_TIMEOUT_S = 10.0
MIN_OBJECT_STORE_BYTES = 100_000_000
OBJECT_STORE_MEMORY_FRACTION = 0.3
STAGES_WITH_WORKERS = ("embed", "neighbors", "heads", "classifier", "assign")
"""Sections of `resources`."""

# Set when we connect unless the user has set them, since Ray reads them in this process and hands them to its workers.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Two threads of a fresh worker may import pydantic at once, and then one of them fails half-way.
    "RAY_preload_python_modules": "pydantic.main",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else Ray Data's own way of making actors prints an error about itself
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",  # its errors reach us as exceptions
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # else each report of a worker waits two seconds for its answer
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else every worker without a GPU warns
}


def connect(resources: ResourcesConfig) -> None:
    """Make Ray usable in this process. Calling it again changes nothing.

    Joined, in this order: the Ray this process is already connected to; `resources.ray_address`; the one that
    RAY_ADDRESS names (inside a `ray job` it always does). Only where there is none, one is started here; it ends with
    this process.

    Raises:
        ResourceError: nothing answers at the address.
    """
    if ray.is_initialized():
        return
    for key, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # for when it was imported before it saw its variable
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = resources.ray_address or os.environ.get("RAY_ADDRESS")
    if resources.ray_address is not None:
        options["address"] = address
    elif not _joins_another(resources):
        options |= {
            "address": "local",
            "num_cpus": resources.num_cpus or usable_cpus(),
            "include_dashboard": False,
            "object_store_memory": resources.object_store_bytes or _object_store_bytes(),
        }
    try:
        if address is not None:
            _check_listens(address)
        with _stderr_only_on_failure():
            ray.init(**options)
    except (ConnectionError, TimeoutError, socket.gaierror) as error:
        raise ResourceError(
            f"no Ray answers at {address!r}: {error}. Start one there (`ray start --head`), or unset "
            "resources.ray_address and RAY_ADDRESS to run on this machine alone"
        ) from None


def disconnect() -> None:
    """Leave the Ray that :func:`connect` joined, and end the one it started, without the half second that Ray takes for
    its log when it is left to the interpreter's exit."""
    if ray.is_initialized():
        ray.shutdown()


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, within its container's quota."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, math.ceil(int(quota) / int(period))))


def available_cpus() -> float:
    """CPUs of all machines of the Ray we are connected to."""
    return sum(cpus for cpus, _ in _machines())


def largest_machine_cpus() -> float:
    """CPUs of the largest machine of the Ray we are connected to: a task that asks for more waits for ever."""
    return max((cpus for cpus, _ in _machines()), default=0.0)


def available_gpus() -> float:
    """GPUs of all machines of the Ray we are connected to."""
    return sum(gpus for _, gpus in _machines())


def worker_cpus(worker: WorkerResources) -> float:
    """CPUs of each of a stage's workers: as configured, else a machine's CPUs divided among the workers on it.

    Threads of a worker are ``max(1, int(worker_cpus(worker)))``.
    """
    if worker.cpus_per_worker is not None:
        return worker.cpus_per_worker
    machines = [cpus for cpus, _ in _machines()]
    return min(machines) / math.ceil(worker.num_workers / len(machines))


def check_resources(config: Config, stages: Collection[str]) -> None:
    """Refuse a run that Ray would wait for for ever, before anything starts.

    Args:
        config: the run's.
        stages: those that will run; a section of `resources` is looked at when its stage is among them.

    Raises:
        ResourceError: what is asked for, what is there, what to set.
    """
    workers = {name: getattr(config.resources, name) for name in STAGES_WITH_WORKERS if name in stages}
    if not workers:
        return
    resources = config.resources
    if _joins_another(resources) or any(worker.gpus_per_worker for worker in workers.values()):
        connect(resources)
        machines = _machines()
    else:  # the one that will be started here: a mistake need not wait for it
        machines = [(float(resources.num_cpus or usable_cpus()), 0.0)]
    for name, worker in workers.items():
        problem = shortfall(name, worker, machines)
        if problem:
            raise ResourceError(problem)


def shortfall(stage: str, worker: WorkerResources, machines: list[tuple[float, float]]) -> str | None:
    """Why `worker` does not fit on `machines` ((CPUs, GPUs) of each), or None where it does."""
    total_cpus = sum(cpus for cpus, _ in machines)
    total_gpus = sum(gpus for _, gpus in machines)
    there = f"Ray has {total_cpus:g} CPUs and {total_gpus:g} GPUs on {len(machines)} machine{'s' * (len(machines) > 1)}"
    key = f"resources.{stage}"
    count, cpus, gpus = worker.num_workers, worker.cpus_per_worker, worker.gpus_per_worker
    if cpus is None and count > total_cpus:
        return (
            f"{key}.num_workers: {count} workers, but {there}. Set it to at most {int(total_cpus)}, set "
            f"{key}.cpus_per_worker, or raise resources.num_cpus"
        )
    if gpus > 0 and sum(_slots(there_gpus, gpus) for _, there_gpus in machines) < count:
        return f"{key}: {count} x {gpus:g} GPUs asked for, but {there}. Lower {key}.num_workers or gpus_per_worker"
    if cpus is None:
        return None
    if sum(_slots(there_cpus, cpus) for there_cpus, _ in machines) < count:
        return f"{key}: {count} x {cpus:g} CPUs asked for, but {there}. Lower {key}.num_workers or cpus_per_worker"
    return None


def _joins_another(resources: ResourcesConfig) -> bool:
    return ray.is_initialized() or resources.ray_address is not None or "RAY_ADDRESS" in os.environ


def _slots(available: float, each: float) -> int:
    return math.floor(available / each + 1e-9)


def _machines() -> list[tuple[float, float]]:
    """(CPUs, GPUs) of each living machine that has CPUs."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    return [(node["CPU"], node.get("GPU", 0.0)) for node in resources if node.get("CPU", 0.0) > 0]


def _check_listens(address: str) -> None:
    """Ray itself tries for many minutes to reach an address at which nothing listens."""
    host, separator, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


@contextmanager
def _stderr_only_on_failure() -> Iterator[None]:
    """Hold back what Ray's C++ writes to stderr while it starts, such as that it was told to be quiet."""
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(original, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)


def _object_store_bytes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = min(MAX_OBJECT_STORE_BYTES, int(OBJECT_STORE_MEMORY_FRACTION * memory))
    try:
        shared = int(0.9 * shutil.disk_usage("/dev/shm").free)
    except OSError:
        return wanted
    # A store larger than /dev/shm goes to disk and is slow; one below Ray's minimum does not start.
    return min(wanted, shared) if shared >= MIN_OBJECT_STORE_BYTES else wanted
