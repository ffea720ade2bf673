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
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from icce_ray.config import Config, ResourcesConfig, WorkerResources
from icce_ray.errors import ResourceError
from icce_ray.runtime.machine import total_memory_bytes, usable_cpus
from icce_ray.runtime.placement import fitting_cpus, shortfall

AUTOSCALER_POLL_S = 1
AUTOSCALER_ANSWER_S = 60.0
SCALE_UP_TIMEOUT_S = 1800.0
MAX_OBJECT_STORE_BYTES = 2_000_000_000
CONNECT_TIMEOUT_S = 10.0
MIN_OBJECT_STORE_BYTES = 100_000_000
OBJECT_STORE_MEMORY_FRACTION = 0.3
STAGES_WITH_WORKERS = ("embed", "neighbors", "method", "classifier", "assign")
"""Sections of `resources`."""

# To be quiet and quick. Set when we connect unless the user has set them, since Ray reads them in this process and
# hands them to its workers.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Two threads of a fresh worker may import pydantic at once, and then one of them fails half-way.
    "RAY_preload_python_modules": "pydantic.main",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else Ray Data's own way of making actors prints an error about itself
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",  # its errors reach us as exceptions
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # else each report of a worker waits two seconds for its answer
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor that tells workers what they would learn by their death
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
    _keep_off_standard_output()
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


def cpus_beside(worker: WorkerResources, num_workers: int, beside: float) -> float:
    """CPUs for each of `num_workers` actors that leave `beside` CPUs together on some machine, wherever Ray puts the
    actors: at most :func:`worker_cpus`, in thousandths. A pool that holds every CPU, or so much of each machine that no
    task fits beside it, is fed by nobody, and waits for ever.
    """
    return fitting_cpus([cpus for cpus, _ in _machines()], num_workers, worker_cpus(worker), beside)


def check_resources(config: Config, stages: Collection[str]) -> None:
    """Refuse a run that Ray would wait for for ever, before anything starts.

    Args:
        config: the run's.
        stages: those that will run; a section of `resources` is looked at when its stage is among them.

    Raises:
        ResourceError: what is asked for, what is there, what to set. Not where Ray's autoscaler can add what is
            missing; that it can takes it some seconds to say.
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
            _ask_for_machines(worker, problem)


def wait_for_machines(resources: ResourcesConfig, stage: str, say: Callable[[str], None]) -> None:
    """On a Ray that grows by itself, wait until the machines for a stage's workers are there; elsewhere, return.

    The stages count machines before they share them out, and Ray brings machines only to who asks for them.

    Args:
        resources: the run's.
        stage: a section of it.
        say: told that, and for what, is waited.

    Raises:
        ResourceError: the machines cannot be had, or have not come in :data:`SCALE_UP_TIMEOUT_S`.
    """
    worker: WorkerResources = getattr(resources, stage)
    problem = shortfall(stage, worker, _machines())
    if problem is None or _autoscaler() is None:
        return
    say(f"waits for machines for {worker.num_workers} x {_in_words(_bundle(worker))}")
    began = time.monotonic()
    with _Question(worker, problem) as question:
        while problem is not None:
            question.ask()
            if time.monotonic() - began > SCALE_UP_TIMEOUT_S:
                raise ResourceError(f"{problem}. Its autoscaler has not added more in {SCALE_UP_TIMEOUT_S:.0f} s")
            problem = shortfall(stage, worker, _machines())


def _ask_for_machines(worker: WorkerResources, problem: str) -> None:
    """Return if Ray's autoscaler can add what `worker` needs, else raise `problem`."""
    if not ray.is_initialized() or _autoscaler() is None:
        raise ResourceError(problem)
    deadline = time.monotonic() + AUTOSCALER_ANSWER_S
    with _Question(worker, problem) as question:
        while not question.ask():
            if time.monotonic() > deadline:
                raise ResourceError(f"{problem}. Its autoscaler has not answered in {AUTOSCALER_ANSWER_S:.0f} s")


class _Question:
    """Can the autoscaler add what a stage's workers need? Asked by a placement group: it goes with us, unlike a request
    for resources, which other jobs overwrite and which outlives its job."""

    def __init__(self, worker: WorkerResources, problem: str) -> None:
        self._problem = problem
        self._group = ray.util.placement_group([_bundle(worker)] * worker.num_workers, strategy="PACK")
        self._asked_at: int | None = None
        """Version of the cluster's state that had the placement group in it."""

    def __enter__(self) -> _Question:
        return self

    def __exit__(self, *_: object) -> None:
        ray.util.remove_placement_group(self._group)

    def ask(self) -> bool:
        """Whether the autoscaler has said that it can; False after :data:`AUTOSCALER_POLL_S` in which it said nothing.

        Raises:
            ResourceError: no machines that it may start can hold it.
        """
        if self._group.wait(AUTOSCALER_POLL_S):
            return True
        reply, name = _autoscaler(), self._group.id.hex()
        if reply is None:
            return False
        state, told = reply.cluster_resource_state, reply.autoscaling_state
        if self._asked_at is None:
            if any(name in request.details for request in state.pending_gang_resource_requests):
                self._asked_at = state.cluster_resource_state_version
            return False
        if told.last_seen_cluster_resource_state_version <= self._asked_at:
            return False
        if any(name in request.details for request in told.infeasible_gang_resource_requests):
            raise ResourceError(f"{self._problem}. Its autoscaler has no machines for that")
        return True


def _autoscaler() -> Any:
    """What Ray's autoscaler (version 2) said last, and what it was told since; None where there is none. Version 1 does
    not say what it cannot do, and counts as none."""
    try:  # not among what Ray promises to keep
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.autoscaler.v2.utils import is_autoscaler_v2
        from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
    except ImportError:
        return None
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    if not is_autoscaler_v2(fetch_from_server=True, gcs_client=client):
        return None
    return GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=AUTOSCALER_ANSWER_S))


def _bundle(worker: WorkerResources) -> dict[str, float]:
    """Resources of each of a stage's workers."""
    bundle = {"CPU": 1.0 if worker.cpus_per_worker is None else worker.cpus_per_worker}
    return bundle | ({"GPU": worker.gpus_per_worker} if worker.gpus_per_worker else {})


def _in_words(bundle: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}s" for name, amount in bundle.items())


def _joins_another(resources: ResourcesConfig) -> bool:
    return ray.is_initialized() or resources.ray_address is not None or "RAY_ADDRESS" in os.environ


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


def _keep_off_standard_output() -> None:
    """Ray tells drivers of lost machines, and the like, on standard output, also after the last line, which is JSON for
    whoever asked for that. It has no setting for this."""
    import ray._private.worker as worker

    original = getattr(worker, "print_to_stdstream", None)
    if original is None or getattr(original, "is_ours", False):
        return

    def print_to_stderr(data: dict[str, Any], *arguments: Any, **options: Any) -> None:
        original(data | {"is_err": True}, *arguments, **options)

    print_to_stderr.is_ours = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = print_to_stderr


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
    wanted = min(MAX_OBJECT_STORE_BYTES, int(OBJECT_STORE_MEMORY_FRACTION * total_memory_bytes()))
    try:
        shared = int(0.9 * shutil.disk_usage("/dev/shm").free)
    except OSError:
        return wanted
    # A store larger than /dev/shm goes to disk and is slow; one below Ray's minimum does not start.
    return min(wanted, shared) if shared >= MIN_OBJECT_STORE_BYTES else wanted
