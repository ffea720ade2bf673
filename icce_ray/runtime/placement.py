"""Arithmetic of what fits on which machines, without Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence

from icce_ray.config import WorkerResources


def shortfall(stage: str, worker: WorkerResources, machines: list[tuple[float, float]]) -> str | None:
    """Why `worker` does not fit on `machines` ((CPUs, GPUs) of each), or None where it does."""
    total_cpus = sum(cpus for cpus, _ in machines)
    total_gpus = sum(gpus for _, gpus in machines)
    there = (
        f"Ray has {total_cpus:g} CPUs and {total_gpus:g} GPUs on {len(machines)} machine{'s' * (len(machines) != 1)}"
    )
    key = f"resources.{stage}"
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
    if cpus is None:
        return None
    if sum(slots(there_cpus, cpus) for there_cpus, _ in machines) < count:
        return f"{key}: {count} x {cpus:g} CPUs asked for, but {there}. Lower {key}.num_workers or cpus_per_worker"
    return None


def fitting_cpus(machines: Sequence[float], count: int, wanted: float, beside: float) -> float:
    """CPUs for each of `count` actors on `machines` (CPUs of each): at most `wanted`, in thousandths, such that all fit
    and, however they are placed, some machine has `beside` CPUs left. If nothing fits, all share what `beside`
    leaves."""
    rooms = {room for cpus in machines for room in (cpus, cpus - beside) if room > 0}
    steps = {room / number for room in rooms for number in range(1, count + 1)}
    for each in sorted({wanted, *(step for step in steps if step < wanted)}, reverse=True):
        each = _thousandths(each)
        if each <= 0 or sum(slots(cpus, each) for cpus in machines) < count:
            continue
        # It takes at least this many actors to leave no machine with room for the task.
        if sum(slots(cpus - beside, each) + 1 for cpus in machines if cpus >= beside) > count:
            return each
    return max(0.001, _thousandths(min(wanted, (sum(machines) - beside) / count)))


def _thousandths(cpus: float) -> float:
    """Rounded down to what Ray counts in."""
    return int(1000 * cpus + 1e-6) / 1000


def slots(available: float, each: float) -> int:
    """How many of `each` there is room for."""
    return math.floor(available / each + 1e-9)
