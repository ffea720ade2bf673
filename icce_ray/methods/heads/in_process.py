"""The heads stage in this process, without Ray: the same parts and the same labels as job.py, seconds sooner for small
collections. Sweeps train their small trials with it. And the parts of the stage, which both write.
"""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch

from icce_ray.config import Config
from icce_ray.embed.feature_matrix import load_features
from icce_ray.errors import WorkerError
from icce_ray.methods.clusterings import Clusterings
from icce_ray.methods.heads.checkpoint import CheckpointFolder
from icce_ray.methods.heads.communicator import Communicator
from icce_ray.methods.heads.metrics_log import MetricsLog
from icce_ray.methods.heads.trained_heads import TrainedHeads
from icce_ray.methods.heads.training import train_heads
from icce_ray.neighbors.graph import load_graph
from icce_ray.sample.draw import training_set
from icce_ray.stage import StageContext
from icce_ray.store import ArtifactWriter


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Train the heads on one CPU process with torch's threads; parts and metrics as in job.py.

    Raises:
        ResourceError: training would not fit into memory.
        WorkerError: the loss was not finite.
    """
    trained = train(config, context)
    write_parts(trained, context.output)
    CheckpointFolder.beside(context.output).clear()
    return trained.summary() | {"num_workers": 1}


def train(
    config: Config,
    context: StageContext,
    until_epoch: int | None = None,
    *,
    communicator: Communicator | None = None,
    device: str = "cpu",
) -> TrainedHeads:
    """Train with torch's threads from the newest checkpoint to the end, or to `until_epoch`, and leave a checkpoint
    there. With a `communicator` this process is one of several.

    Raises:
        ResourceError: training would not fit into memory.
        WorkerError: the loss was not finite.
    """
    try:
        return train_heads(
            load_features(training_set(context.inputs)).matrix,
            load_graph(context.inputs["neighbors"]),
            config.heads,
            num_clusters=config.num_clusters,
            seed=config.seed,
            communicator=communicator,
            device=device,
            num_threads=torch.get_num_threads(),
            checkpoints=CheckpointFolder.beside(context.output),
            progress=context.progress,
            metrics_log=MetricsLog(context.output.folder),
            until_epoch=until_epoch,
        )
    except FloatingPointError as error:
        raise WorkerError(f"heads: {error}") from error


def write_parts(trained: TrainedHeads, output: ArtifactWriter) -> None:
    """Write the clusterings and heads.safetensors."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in trained.parameters.named().items()}
    Clusterings(
        trained.label_matrix_HN,
        trained.head_losses_H,
        {"heads.safetensors": safetensors.torch.save(tensors)},
        trained.history,
        {"collapsed_heads": trained.collapsed_heads},
    ).write(output)
