"""A stage's work in other processes, by Ray; or, where :func:`~icce_ray.runtime.ray_cluster.runs_here`, in this one.

Three kinds of work: processes that train together (:func:`work_on_workers`), tasks that are independent of each other
(:func:`run_tasks`), and tasks that share a state which takes time to set up (:func:`run_on_actors`). Work in a process
that dies is repeated elsewhere. None of it may return anything else for being repeated or divided differently.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from icce_ray.config import ResourcesConfig, WorkerResources
from icce_ray.errors import DamagedArtifactError, UserError, WorkerError, describe_cause, find_cause
from icce_ray.runtime.cluster_resources import available_cpus, wait_for_machines, worker_cpus, worker_threads
from icce_ray.runtime.progress import BoardProgress, Progress, ProgressBoard
from icce_ray.runtime.ray_cluster import connect, runs_here, threads_here
from icce_ray.runtime.worker_process import MAX_RESTARTS, Work, attempt, relayed_progress

TASKS_PER_CPU = 2
"""Tasks that are submitted at a time: enough to keep each CPU busy, and no more results than that wait in memory."""


def work_on_workers(
    stage: str,
    work: Work,
    resources: ResourcesConfig,
    progress: Progress,
    num_images: int,
    *,
    max_workers: int | None = None,
    backend: str | None = None,
) -> Any:
    """Run the same function in each of a stage's processes: in an actor, or by Ray Train if there are several. The
    section `stage` of `resources` says how many there are, and what each has.

    A process that dies is started again, and so is work that fails for a reason that may pass, MAX_RESTARTS times. The
    work has to find by itself what it had finished before. Returns what the work returns in the process of rank 0.
    Raises UserError, WorkerError: as the work raised it; it is not tried again; WorkerError: processes died, or the
    work failed, more often than it is tried again. The `backend` of torch.distributed is by default NCCL on GPUs, gloo
    elsewhere."""
    if runs_here(resources, num_images):
        return _unless_failed(_work_here(stage, work, progress))
    connect(resources)
    wait_for_machines(resources, stage, progress.note)
    workers: WorkerResources = getattr(resources, stage)
    if max_workers is not None:
        workers = workers.model_copy(update={"num_workers": min(workers.num_workers, max_workers)})
    work = partial(work, num_threads=worker_threads(workers))
    if workers.num_workers == 1:
        return _unless_failed(_work_in_actor(stage, work, workers, progress))
    # Imports Ray Train and torch, which take seconds.
    from icce_ray.runtime.ray_train import train

    return _unless_failed(train(stage, work, workers, progress, backend))


def _unless_failed(outcome: Any) -> Any:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def run_tasks(
    stage: str,
    function: Callable[..., Any],
    items: Iterable[Any],
    shared: tuple[Any, ...] = (),
    *,
    resources: ResourcesConfig,
    num_images: int,
    name: str | None = None,
    in_order: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """Call ``function(item, *shared)`` for each item, each in a task with one CPU and one thread, and yield each item
    and its result. Items are consumed as tasks are submitted; `shared` is sent to each machine once. Raises UserError,
    DamagedArtifactError: as a task raised it; WorkerError: a task failed otherwise, or its process died more often than
    it is repeated.

    Args:
        name: of the tasks in Ray's dashboard.
        in_order: yield in the order of the items instead of as they are finished.
    """
    if runs_here(resources, num_images):
        for item in items:
            yield item, function(item, *shared)
        return
    connect(resources)
    import ray

    task = ray.remote(function).options(name=f"{stage}: {name or 'task'}", num_cpus=1, max_retries=MAX_RESTARTS)
    references = [ray.put(value) for value in shared]
    limit = max(1, int(TASKS_PER_CPU * available_cpus()))
    waiting, running = iter(items), dict[Any, Any]()
    with translated_errors(stage):
        while True:
            while len(running) < limit and (item := next(waiting, _END)) is not _END:
                running[task.remote(item, *references)] = item
            if not running:
                return
            ready = next(iter(running)) if in_order else ray.wait(list(running), num_returns=1)[0][0]
            result = ray.get(ready)
            yield running.pop(ready), result


def run_on_actors(
    stage: str,
    make: Callable[[], Callable[[Any], Any]],
    items: Iterable[Any],
    *,
    resources: ResourcesConfig,
    progress: Progress,
    num_images: int,
) -> Iterator[tuple[Any, Any]]:
    """Call an object with each item, each item on any of the stage's actors, and yield each item and its result as they
    are finished. `make` makes the object, in each actor, or here for few images. Raises as :func:`run_tasks`."""
    if runs_here(resources, num_images):
        call = make()
        for item in items:
            yield item, call(item)
        return
    connect(resources)
    wait_for_machines(resources, stage, progress.note)
    import ray

    workers: WorkerResources = getattr(resources, stage)
    actor = _actor(CallingActor, workers, max_restarts=-1)
    actors: list[Any] = []
    waiting, running = iter(items), dict[Any, tuple[Any, Any]]()
    try:
        with translated_errors(stage):
            while True:
                free = [each for each in actors if all(each is not busy for busy, _ in running.values())]
                while (free or len(actors) < workers.num_workers) and (item := next(waiting, _END)) is not _END:
                    if not free:
                        actors.append(actor.remote(stage, make))
                        free.append(actors[-1])
                    worker = free.pop()
                    running[worker.call.remote(item)] = (worker, item)
                if not running:
                    return
                ready = ray.wait(list(running), num_returns=1)[0][0]
                result = ray.get(ready)
                yield running.pop(ready)[1], result
    finally:
        stop_actors(actors)


_END = object()


class CallingActor:
    """An actor that holds an object and calls it."""

    def __init__(self, stage: str, make: Callable[[], Any]) -> None:
        self._stage = stage
        self._make = make
        self._object: Any = None

    def __repr__(self) -> str:  # its name in Ray's dashboard
        return f"{self._stage}: worker"

    def call(self, item: Any) -> Any:
        # Not in the constructor: an error there reaches the driver as a dead actor, without its own message.
        if self._object is None:
            self._object = self._make()
        return self._object(item)


def start_actors(kind: type, workers: WorkerResources, arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
    """An actor of the class for each tuple of arguments. One that dies is started again, and repeats its calls."""
    actor = _actor(kind, workers)
    return [actor.remote(*each) for each in arguments]


def _actor(kind: type, workers: WorkerResources, **options: Any) -> Any:
    import ray

    given = {"num_gpus": workers.gpus_per_worker, "max_restarts": MAX_RESTARTS} | options
    return ray.remote(kind).options(num_cpus=worker_cpus(workers), max_task_retries=MAX_RESTARTS, **given)


def stop_actors(actors: Iterable[Any]) -> None:
    import ray

    for actor in actors:
        ray.kill(actor)


@contextmanager
def translated_errors(stage: str) -> Iterator[None]:
    """Raise our own error for one of Ray's."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        for kind in (UserError, DamagedArtifactError, WorkerError):
            if (known := find_cause(error, kind)) is not None:
                raise known from None
        raise WorkerError(
            f"{stage}: a worker failed, or died {MAX_RESTARTS + 1} times, often for want of memory; what is finished "
            f"is kept, and the same command resumes. {describe_cause(error)}"
        ) from error


class StageWorker(ProgressBoard):
    """The actor of a stage with one worker. It runs two calls at a time: one works, one asks for the progress."""

    def __repr__(self) -> str:
        return f"{self.stage}: worker"

    def work(self, work: Work, device: str) -> Any:
        return attempt(work, device, BoardProgress(self.stage, self.post))


def _work_in_actor(stage: str, work: Work, workers: WorkerResources, progress: Progress) -> Any:
    import ray

    worker = _actor(StageWorker, workers, num_gpus=min(1.0, workers.gpus_per_worker), max_concurrency=2).remote(stage)
    device = "cuda" if workers.gpus_per_worker else "cpu"
    try:
        with relayed_progress(worker.read.remote, progress):
            return ray.get(worker.work.options(retry_exceptions=True).remote(work, device))
    except ray.exceptions.RayActorError as error:
        raise WorkerError(
            f"{stage}: its process died {MAX_RESTARTS + 1} times ({' '.join(str(error).split())[:300]}). Out of memory "
            "is the usual cause: use a machine with more memory"
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise _failed_too_often(stage, error) from error
    finally:
        ray.kill(worker)


def _work_here(stage: str, work: Work, progress: Progress) -> Any:
    work = partial(work, num_threads=threads_here())
    restarts = 0
    while True:
        try:
            return attempt(work, "cpu", BoardProgress(stage, progress.update))
        except Exception as error:
            if restarts == MAX_RESTARTS:
                raise _failed_too_often(stage, error) from error
            restarts += 1


def _failed_too_often(stage: str, error: Exception) -> WorkerError:
    return WorkerError(f"{stage}: failed {MAX_RESTARTS + 1} times: {describe_cause(error)}")
