"""Train heads and label every image with each (docs/METHOD.md, "Heads"), without Ray."""

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from icce_ray.config import HeadsConfig
from icce_ray.methods.clusterings import Clusterings
from icce_ray.methods.heads.checkpoint import CheckpointFolder, MetricsLog
from icce_ray.methods.heads.communicator import Communicator, SingleWorker
from icce_ray.methods.heads.trainer import HeadTrainer
from icce_ray.neighbors.graph import NeighborGraph
from icce_ray.runtime.progress import QUIET, Progress
from icce_ray.store import Folder

WEIGHTS_NAME = "heads.safetensors"
EARLY_STOP_EPOCHS = 3


def fit(
    features_ND: npt.NDArray[Any],
    graph: NeighborGraph,
    settings: HeadsConfig,
    *,
    num_clusters: int,
    seed: int,
    device: torch.device | str = "cpu",
    num_threads: int | None = None,
    progress: Progress = QUIET,
    folder: Folder | None = None,
    communicator: Communicator | None = None,
) -> Clusterings:
    """Train the heads. Those that collapse are left out of the result.

    Args:
        features_ND: float16 or float32 (N, D), finite.
        graph: neighbours of the same N images.
        folder: where to keep checkpoints every `checkpoint_interval_s`, resume from them, and write metrics.jsonl.
        communicator: the workers that divide the heads; None: this process trains all. The number of workers does not
            change the result.

    Returns:
        On the worker of rank 0, labels, the last epoch's losses, the teachers' weights (heads.safetensors), the history
        by epoch, and as notes `collapsed_heads` and `stopped_early`. On the others, without labels and weights.

    Raises:
        FloatingPointError: a loss is not finite.
        ResourceError: it would not fit into memory, or there are more workers than heads.
    """
    communicator = communicator or SingleWorker()
    trainer = HeadTrainer(
        features_ND,
        graph,
        settings,
        num_clusters=num_clusters,
        seed=seed,
        communicator=communicator,
        device=torch.device(device),
        num_threads=num_threads or torch.get_num_threads(),
    )
    is_first = communicator.rank == 0
    checkpoints = None if folder is None else CheckpointFolder(folder)
    metrics_log = None if folder is None or not is_first else MetricsLog(folder)
    if checkpoints is not None:
        _resume(trainer, checkpoints)
    last_saved = time.monotonic()
    while not _is_finished(trainer):
        trainer.train_epoch()
        progress.update(trainer.epoch, settings.num_epochs, f"loss {trainer.history[-1]['loss']:.4f}")
        if metrics_log is not None:
            metrics_log.update(trainer.history, finished=_is_finished(trainer))
        if checkpoints is not None and not _is_finished(trainer):
            is_due = torch.tensor([time.monotonic() - last_saved >= settings.checkpoint_interval_s])
            # The first worker's clock counts: all must save at the same epochs.
            if _from_all(communicator, is_due, trainer.device)[0]:
                checkpoints.save(trainer.tensors(), trainer.values(), trainer.heads)
                last_saved = time.monotonic()
    return _clusterings(trainer, num_clusters)


def find_collapsed_heads(labels_HN: npt.NDArray[np.integer[Any]], num_clusters: int) -> list[int]:
    """Heads that use fewer than half of the available clusters, or fewer than two [ours]."""
    smallest = max(2, min(num_clusters, labels_HN.shape[1]) / 2)
    return [head for head, labels_N in enumerate(labels_HN) if len(np.unique(labels_N)) < smallest]


def stage_metrics(clusterings: Clusterings) -> dict[str, Any]:
    """Figures for the manifest and the log."""
    losses_H, history = clusterings.losses_H, clusterings.history
    assert losses_H is not None
    seconds = [epoch["seconds"] for epoch in history]
    return {
        "num_heads": len(losses_H),
        "num_epochs": len(history),
        "stopped_early": clusterings.notes["stopped_early"],
        "loss": float(losses_H.mean()),
        "best_head": int(losses_H.argmin()),
        "best_head_loss": float(losses_H.min()),
        "collapsed_heads": clusterings.notes["collapsed_heads"],
        "label_change": history[-1]["label_change"],
        "seconds_per_epoch": round(sum(seconds) / len(seconds), 4),
    }


def _resume(trainer: HeadTrainer, checkpoints: CheckpointFolder) -> None:
    """Load the newest checkpoint that every worker can read."""
    max_epoch = None
    while True:
        saved = checkpoints.load(trainer.heads, max_epoch)
        epoch = 0 if saved is None else saved[1]["epoch"]
        epochs = _from_all(trainer.communicator, torch.tensor([epoch]), trainer.device)
        if (epochs == epochs[0]).all():
            break
        max_epoch = int(epochs.min())
    if saved is not None:
        trainer.load(*saved)


def _from_all(communicator: Communicator, value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A number of each worker, in the order of ranks."""
    return communicator.gather(value.to(device), [1] * communicator.num_workers)


def _is_finished(trainer: HeadTrainer) -> bool:
    return trainer.epoch == trainer.settings.num_epochs or _labels_are_stable(trainer)


def _labels_are_stable(trainer: HeadTrainer) -> bool:
    """Whether the share of labels that changed was below `early_stop_change` in each of the last three epochs."""
    limit, last = trainer.settings.early_stop_change, trainer.history[-EARLY_STOP_EPOCHS:]
    if limit is None or len(last) < EARLY_STOP_EPOCHS:
        return False
    return all(epoch["label_change"] is not None and epoch["label_change"] < limit for epoch in last)


def _clusterings(trainer: HeadTrainer, num_clusters: int) -> Clusterings:
    gather = trainer.communicator.gather_on_first
    num_heads = trainer.division.num_heads
    teacher = trainer.state.teacher.map(lambda tensor: gather(tensor, num_heads).cpu())
    labels_HN = gather(torch.from_numpy(trainer.label_matrix()).to(trainer.device), num_heads).cpu().numpy()
    losses_H = trainer.head_losses_H
    if trainer.communicator.rank != 0:
        return Clusterings(labels_HN, losses_H, history=trainer.history)
    collapsed = find_collapsed_heads(labels_HN, num_clusters)
    kept = [head for head in range(len(labels_HN)) if head not in collapsed]
    if collapsed and kept:
        labels_HN, losses_H = labels_HN[kept], losses_H[kept]
        teacher = teacher.map(lambda tensor: tensor[kept])
    else:
        collapsed = []
    return Clusterings(
        labels_HN,
        losses_H,
        files={WEIGHTS_NAME: safetensors.torch.save(teacher.named())},
        history=trainer.history,
        notes={"collapsed_heads": collapsed, "stopped_early": trainer.epoch < trainer.settings.num_epochs},
    )
