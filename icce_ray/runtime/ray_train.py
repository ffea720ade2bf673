"""Work on several processes by Ray Train: it starts them, lets them find each other by torch.distributed, and starts
all of them again when one dies."""

import os
import uuid
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from icce_ray.config import WorkerResources
from icce_ray.errors import WorkerError, describe_cause
from icce_ray.runtime.cluster_resources import worker_cpus
from icce_ray.runtime.machine import interface_with
from icce_ray.runtime.progress import BoardProgress, Progress, ProgressBoard
from icce_ray.runtime.worker_process import MAX_RESTARTS, Work, attempt, relayed_progress
from icce_ray.store.cache import scratch_folder
from icce_ray.store.patient_filesystem import within

MAX_STARTS = 10
"""How often Ray Train, which waits a minute each time, tries to start the workers. By default it tries for ever."""
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def train(stage: str, work: Work, workers: WorkerResources, progress: Progress, backend: str | None) -> Any:
    """See :func:`icce_ray.runtime.workers.work_on_workers`. Raises WorkerError: training ended more often than it is
    started again."""
    board: Any = ray.remote(ProgressBoard).options(num_cpus=0, max_restarts=-1).remote(stage)
    gpus = {"GPU": workers.gpus_per_worker} if workers.gpus_per_worker else {}
    with scratch_folder() as storage:
        trainer = TorchTrainer(
            _on_worker,  # type: ignore[arg-type]  # what it returns is `return_value` below
            train_loop_config={"stage": stage, "work": work, "on_gpu": workers.gpus_per_worker > 0, "board": board},
            torch_config=HostsTorchConfig(backend=backend),
            scaling_config=ScalingConfig(
                num_workers=workers.num_workers,
                use_gpu=workers.gpus_per_worker > 0,
                resources_per_worker={"CPU": worker_cpus(workers)} | gpus,
            ),
            run_config=RunConfig(
                # Ray Train resumes a run of the same name by itself, with its own idea of what was done.
                name=f"{stage}-{uuid.uuid4().hex[:12]}",
                storage_path=str(storage),
                failure_config=FailureConfig(
                    max_failures=MAX_RESTARTS,
                    controller_failure_limit=MAX_STARTS - 1,  # type: ignore[call-arg]
                ),
            ),
        )
        try:
            with relayed_progress(board.read.remote, progress):
                return fit_in_thread(trainer)
        except ray.train.ControllerError as error:
            raise WorkerError(
                f"{stage}: its {workers.num_workers} workers could not be started, {MAX_STARTS} times: a machine is "
                "gone or does not start, or other jobs use it. See `ray status`; then run the same command again, or "
                f"with a smaller resources.{stage}.num_workers"
            ) from error
        except ray.train.TrainingFailedError as error:
            raise WorkerError(f"{stage}: ended {MAX_RESTARTS + 1} times: {describe_cause(error)}") from error


class HostsTorchConfig(TorchConfig):
    """Workers on several hosts find each other at the addresses that Ray knows."""

    @property
    def backend_cls(self) -> Any:
        return _HostsBackend


class _HostsBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, *arguments: Any) -> None:
        worker_group.execute(lambda: use_interface_of(ray.util.get_node_ip_address()))  # type: ignore[no-untyped-call]
        super().on_start(worker_group, *arguments)


def use_interface_of(address: str) -> None:
    """Let gloo use the network interface of this machine that has the IPv4 `address`, unless the user has chosen one.
    By default it resolves the host's own name, which fails on many hosts, or gives an address of the loopback interface
    (127.0.1.1 on Debian), where workers on other hosts cannot reach it."""
    if (name := interface_with(address)) is not None:
        os.environ.setdefault(GLOO_INTERFACE, name)


def fit_in_thread(trainer: Any) -> Any:
    """The result of rank 0. It runs in a thread: in the main thread Ray Train would replace the handler of
    Ctrl-C, end the process without a message, and not restore the handler."""
    return within(None, lambda: trainer.fit().return_value)


def _on_worker(given: dict[str, Any]) -> Any:
    is_first = ray.train.get_context().get_world_rank() == 0  # Ray Train returns its result
    post = given["board"].post.remote
    progress = BoardProgress(given["stage"], post) if is_first else Progress(given["stage"], quiet=True)
    return attempt(given["work"], str(get_device()) if given["on_gpu"] else "cpu", progress)
