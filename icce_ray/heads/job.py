"""The heads stage on Ray Train: every worker holds all heads and takes its share of each batch.

The worker of rank 0 saves checkpoints into the artifact's folder and writes the parts; a run that was killed goes on
from the newest checkpoint, on any number of workers.
"""

from __future__ import annotations

import tempfile
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from icce_ray.cluster import connect, wait_for_machines, worker_cpus
from icce_ray.config import Config
from icce_ray.context import StageContext
from icce_ray.embed.features import load_features
from icce_ray.errors import ResourceError, WorkerError, describe_cause
from icce_ray.heads.communicator import SingleWorker, TorchDistributed, talk_over
from icce_ray.heads.local import checkpoint_folder, write_parts
from icce_ray.heads.metrics_log import MetricsLog
from icce_ray.heads.training import train_heads
from icce_ray.neighbors.graph import load_graph
from icce_ray.progress import BoardProgress, Progress, ProgressBoard
from icce_ray.sample.draw import training_set
from icce_ray.store import Artifact, ArtifactWriter, Part

VERSION = 2
MAX_FAILURES = 3
POLL_INTERVAL_S = 1.0


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Train the heads: label_matrix.npy (H x N int32), heads.safetensors, training.json (head_losses, collapsed_heads,
    history), all without the heads that collapsed. While it runs, and afterwards, metrics.jsonl shows every epoch.

    Returns:
        num_heads, num_epochs, stopped_early, loss (mean over heads, last epoch), best_head, best_head_loss,
        num_workers, seconds_per_epoch, label_change (share, last epoch), collapsed_heads (those that use fewer than
        half of their clusters).

    Raises:
        ResourceError: training would not fit into a worker's memory.
        WorkerError: the loss was not finite, or workers died more often than training is restarted.
    """
    connect(config.resources)
    wait_for_machines(config.resources, "heads", context.progress.note)
    worker = config.resources.heads
    cpus = worker_cpus(worker)
    checkpoints = checkpoint_folder(context)
    board = ray.remote(ProgressBoard).options(num_cpus=0, max_restarts=-1).remote("heads")
    settings = {
        "config": config,
        "embed": training_set(context.inputs),
        "neighbors": context.inputs["neighbors"],
        "output": context.output,
        "checkpoints": checkpoints,
        "board": board,
        "num_threads": max(1, int(cpus)),
    }
    with tempfile.TemporaryDirectory(prefix="icce_ray-train-") as storage:
        trainer = TorchTrainer(
            _train_on_worker,  # type: ignore[arg-type]  # what it returns is `return_value` below
            train_loop_config=settings,
            torch_config=HostsTorchConfig(),
            scaling_config=ScalingConfig(
                num_workers=worker.num_workers,
                use_gpu=worker.gpus_per_worker > 0,
                resources_per_worker=_resources(cpus, worker.gpus_per_worker),
            ),
            run_config=RunConfig(
                # Ray Train resumes a run of the same name by itself, with its own idea of what was done.
                name=f"heads-{uuid.uuid4().hex[:12]}",
                storage_path=storage,
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        try:
            with relayed_progress(board, context.progress):
                outcome = fit_in_thread(trainer)
        except ray.train.TrainingFailedError as error:
            raise WorkerError(f"heads: training ended {MAX_FAILURES + 1} times: {describe_cause(error)}") from error
    if "shortage" in outcome:
        raise ResourceError(f"heads: {outcome['shortage']}")
    if "failure" in outcome:
        raise WorkerError(f"heads: {outcome['failure']}")
    for part in outcome["parts"]:
        context.output.add(Part(**part))
    checkpoints.clear()
    metrics: dict[str, Any] = outcome["metrics"]
    if metrics["collapsed_heads"]:
        heads = ", ".join(map(str, metrics["collapsed_heads"]))
        context.progress.note(f"heads {heads} collapsed into few clusters; the consensus does without them")
    return metrics | {"num_workers": worker.num_workers}


class HostsTorchConfig(TorchConfig):
    """Workers on several hosts find each other at the addresses that Ray knows."""

    @property
    def backend_cls(self) -> Any:
        return _HostsBackend


class _HostsBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, *arguments: Any) -> None:
        worker_group.execute(_talk_over_this_node)
        super().on_start(worker_group, *arguments)


def _talk_over_this_node() -> None:
    talk_over(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def fit_in_thread(trainer: Any) -> dict[str, Any]:
    """What the worker of rank 0 returns. In a thread of its own, because in the main thread Ray Train takes Ctrl-C for
    itself, ends the process without a word, and does not give it back afterwards."""
    outcome: Future[dict[str, Any]] = Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit().return_value)
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=fit, name="icce_ray-heads-fit", daemon=True).start()
    return outcome.result()


def _train_on_worker(settings: dict[str, Any]) -> dict[str, Any]:
    config: Config = settings["config"]
    torch.set_num_threads(settings["num_threads"])
    is_alone = config.resources.heads.num_workers == 1
    embed: Artifact = settings["embed"]
    try:
        trained = train_heads(
            load_features(embed).matrix,
            load_graph(settings["neighbors"]),
            config.heads,
            num_clusters=config.num_clusters,
            seed=config.seed,
            communicator=SingleWorker() if is_alone else TorchDistributed(),
            device=get_device() if config.resources.heads.gpus_per_worker else "cpu",
            num_threads=settings["num_threads"],
            checkpoints=settings["checkpoints"],
            progress=BoardProgress(settings["board"]),
            metrics_log=MetricsLog(settings["output"].folder),
        )
    # As values: an exception would be retried, and come again.
    except FloatingPointError as error:
        return {"failure": str(error)}
    except ResourceError as error:
        return {"shortage": str(error)}
    if ray.train.get_context().get_world_rank() != 0:
        return {}
    output: ArtifactWriter = settings["output"]
    write_parts(trained, output)
    return {"parts": [part.model_dump() for part in output.parts.values()], "metrics": trained.summary()}


@contextmanager
def relayed_progress(board: Any, progress: Progress) -> Iterator[None]:
    """Pass on what the board says while the block runs."""
    finished = threading.Event()

    def relay() -> None:
        while not finished.wait(POLL_INTERVAL_S):
            try:
                latest = ray.get(board.read.remote(), timeout=POLL_INTERVAL_S)
            except ray.exceptions.RayError:
                continue
            if latest is not None:
                progress.update(*latest)

    thread = threading.Thread(target=relay, name="heads-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _resources(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
