"""CPUs and GPUs of the connected Ray: how a stage's workers share them, and whether a config asks for more than there
are or can be had. Ray itself waits forever for resources that no machine has."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from icce_ray.config import Config, ResourcesConfig, WorkerResources
from icce_ray.errors import ResourceError
from icce_ray.runtime.machine import available_memory_bytes, usable_cpus
from icce_ray.runtime.ray_cluster import connect, is_connected, joins_ray

AUTOSCALER_POLL_S = 1
AUTOSCALER_ANSWER_S = 60.0
SCALE_UP_TIMEOUT_S = 1800.0
STAGES_WITH_WORKERS = ("embed", "neighbors", "method", "classifier", "assign")
"""Sections of `resources`."""


def available_cpus() -> float:
    """CPUs of all machines of the Ray we are connected to."""
    return sum(cpus for cpus, _ in _machines())


def available_gpus() -> float:
    return sum(gpus for _, gpus in _machines())


def largest_machine_cpus() -> float:
    """A task that asks for more waits forever."""
    return max((cpus for cpus, _ in _machines()), default=0.0)


def worker_cpus(worker: WorkerResources) -> float:
    """CPUs of each of a stage's workers: as configured, otherwise a machine's CPUs divided among the workers on it."""
    if worker.cpus_per_worker is not None:
        return worker.cpus_per_worker
    machines = [cpus for cpus, _ in _machines()]
    return min(machines) / math.ceil(worker.num_workers / len(machines))


class PoolCpus(NamedTuple):
    """CPUs for a pool of actors and the tasks that feed it."""

    actor: float
    """At most :func:`worker_cpus`, and as :func:`fitting_cpus`. If no machine had room left for a task, actors would
    deadlock: no upstream task could be scheduled."""
    task: float
    free: float
    """CPUs that are left beside the actors on some machine."""

    @classmethod
    def of(cls, worker: WorkerResources, num_actors: int, tasks_per_cpu: int) -> PoolCpus:
        free = min(1.0, largest_machine_cpus() / 2)
        actor = fitting_cpus([cpus for cpus, _ in _machines()], num_actors, worker_cpus(worker), free)
        task = free / tasks_per_cpu
        # Ray Data fuses steps that ask for the same resources. What kills a task would then kill actors, which take
        # longer to come back.
        return cls(actor - 0.001 if actor == task else actor, task, free)


def worker_threads(worker: WorkerResources) -> int:
    """Threads of each of a stage's workers."""
    return max(1, int(worker_cpus(worker)))


def memory_of_machines(actors: Sequence[Any]) -> list[tuple[int, int]]:
    """(number of actors, available memory in bytes) of each machine that has some of the actors."""
    import ray

    machines: dict[str, list[int]] = defaultdict(list)
    for node, available in ray.get([actor.__ray_call__.remote(_node_and_memory) for actor in actors]):
        machines[node].append(available)
    return [(len(found), min(found)) for found in machines.values()]


def _node_and_memory(_: object) -> tuple[str, int]:
    import ray

    return ray.get_runtime_context().get_node_id(), available_memory_bytes()


def check_resources(config: Config, stages: Collection[str]) -> None:
    """Refuse a run of these stages that would wait forever for its resources, before anything starts. Raises
    ResourceError: what is asked for, what the machines have, what to set; unless Ray's autoscaler can add what is
    missing."""
    resources = config.resources
    workers = {name: getattr(resources, name).at_start() for name in STAGES_WITH_WORKERS if name in stages}
    if all(worker == type(worker)() for worker in workers.values()):
        return  # one worker without GPUs fits everywhere
    if joins_ray(resources) or any(worker.gpus_per_worker for worker in workers.values()):
        connect(resources)
        machines = _machines()
    else:  # the one that will be started here, which is not needed to find a mistake
        machines = [(float(resources.num_cpus or usable_cpus()), 0.0)]
    for name, worker in workers.items():
        problem = shortfall(name, worker, machines)
        if problem:
            _ask_for_machines(worker, problem)


def wait_for_machines(resources: ResourcesConfig, stage: str, say: Callable[[str], None]) -> None:
    """On a Ray that autoscales, `say` what machines a stage's workers need, and wait until they are there; elsewhere,
    return.

    Stages divide their work by the number of machines, and Ray adds machines only when they are asked for. Raises
    ResourceError: the machines cannot be had, or have not come in :data:`SCALE_UP_TIMEOUT_S`."""
    worker: WorkerResources = getattr(resources, stage).at_start()
    problem = shortfall(stage, worker, _machines())
    if problem is None or _autoscaler() is None:
        return
    needed = " and ".join(f"{amount:g} {name}s" for name, amount in _bundle(worker).items())
    say(f"waits for machines for {worker.num_workers} x {needed}")
    began = time.monotonic()
    with _MachinesRequest(worker, problem) as request:
        while problem is not None:
            request.can_be_met()
            if time.monotonic() - began > SCALE_UP_TIMEOUT_S:
                raise ResourceError(f"{problem}. Its autoscaler has not added more in {SCALE_UP_TIMEOUT_S:.0f} s")
            problem = shortfall(stage, worker, _machines())


def _ask_for_machines(worker: WorkerResources, problem: str) -> None:
    """Return if Ray's autoscaler can add what `worker` needs, else raise `problem`."""
    if not is_connected() or _autoscaler() is None:
        raise ResourceError(problem)
    deadline = time.monotonic() + AUTOSCALER_ANSWER_S
    with _MachinesRequest(worker, problem) as request:
        while not request.can_be_met():
            if time.monotonic() > deadline:
                raise ResourceError(f"{problem}. Its autoscaler has not answered in {AUTOSCALER_ANSWER_S:.0f} s")


class _MachinesRequest:
    """Asks the autoscaler for what a stage's workers need, by a placement group: that ends with this process, unlike a
    request for resources, which other jobs overwrite and which outlives its job."""

    def __init__(self, worker: WorkerResources, problem: str) -> None:
        import ray

        self._problem = problem
        self._group = ray.util.placement_group([_bundle(worker)] * worker.num_workers, strategy="PACK")
        self._asked_at: int | None = None
        """Version of the cluster's state that first had the placement group in it."""

    def __enter__(self) -> _MachinesRequest:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.util.remove_placement_group(self._group)

    def can_be_met(self) -> bool:
        """Whether the autoscaler has said that it can add the machines; False if it has said nothing within
        :data:`AUTOSCALER_POLL_S`. Raises ResourceError: no machines that it may start can hold the workers."""
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
    """The last answer of Ray's autoscaler (version 2), and the cluster's state since; None if there is none. Version 1
    does not say what it cannot do, and counts as none."""
    import ray

    try:  # no public call says which requests are infeasible, and as of which state of the cluster
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


def _machines() -> list[tuple[float, float]]:
    """(CPUs, GPUs) of each living machine that has CPUs."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    return [(node["CPU"], node.get("GPU", 0.0)) for node in resources if node.get("CPU", 0.0) > 0]


def shortfall(stage: str, worker: WorkerResources, machines: list[tuple[float, float]]) -> str | None:
    """Why `worker` does not fit on `machines` ((CPUs, GPUs) of each), or None where it does."""
    total_cpus, total_gpus = (sum(amounts) for amounts in zip((0.0, 0.0), *machines, strict=True))
    some = f"{len(machines)} machine{'s' * (len(machines) != 1)}"
    there, key = f"Ray has {total_cpus:g} CPUs and {total_gpus:g} GPUs on {some}", f"resources.{stage}"
    count, cpus, gpus = worker.num_workers, worker.cpus_per_worker, worker.gpus_per_worker
    if gpus > 0 and sum(slots(there_gpus, gpus) for _, there_gpus in machines) < count:
        return f"{key}: {count} x {gpus:g} GPUs asked for, but {there}. Lower {key}.num_workers or gpus_per_worker"
    if cpus is None and total_cpus < 1:
        return f"{key}.num_workers: {count} workers, but {there}. Start machines with CPUs"
    if cpus is None and count > total_cpus:
        return (
            f"{key}.num_workers: {count} workers, but {there}. Set it to at most {int(total_cpus)}, set "
            f"{key}.cpus_per_worker, or raise resources.num_cpus"
        )
    if cpus is not None and sum(slots(there_cpus, cpus) for there_cpus, _ in machines) < count:
        return f"{key}: {count} x {cpus:g} CPUs asked for, but {there}. Lower {key}.num_workers or cpus_per_worker"
    return None


def fitting_cpus(machines: Sequence[float], count: int, wanted: float, beside: float) -> float:
    """CPUs for each of `count` actors on `machines` (CPUs of each): at most `wanted`, in thousandths, such that all fit
    and, however they are placed, some machine has `beside` CPUs left. If nothing fits, a thousandth."""
    rooms = {room for cpus in machines for room in (cpus, cpus - beside) if room > 0}
    steps = {room / number for room in rooms for number in range(1, count + 1)}
    for each in sorted({wanted, *(step for step in steps if step < wanted)}, reverse=True):
        each = int(1000 * each + 1e-6) / 1000
        if each <= 0 or sum(slots(cpus, each) for cpus in machines) < count:
            continue
        # It takes at least this many actors to leave no machine with room for the task.
        if sum(slots(cpus - beside, each) + 1 for cpus in machines if cpus >= beside) > count:
            return each
    return 0.001


def slots(available: float, each: float) -> int:
    """How many of `each` there is room for."""
    return math.floor(available / each + 1e-9)
