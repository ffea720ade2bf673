"""The heads stage on Ray: every worker holds all heads and takes its share of each batch. One worker is an actor,
several are Ray Train's.

The worker of rank 0 saves checkpoints into the artifact's folder and writes the parts; a run that was killed goes on
from the newest checkpoint, on any number of workers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from icce_ray.config import Config
from icce_ray.embed.feature_matrix import load_features
from icce_ray.errors import ResourceError
from icce_ray.methods.heads.checkpoint import CheckpointFolder
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.workers import work_on_workers
from icce_ray.sample.draw import training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Train the heads: label_matrix.npy (H x N int32), heads.safetensors, clusterings.json (losses, collapsed_heads,
    history), all without the heads that collapsed. While it runs, and afterwards, metrics.jsonl shows every epoch.

    Returns:
        num_heads, num_epochs, stopped_early, loss (mean over heads, last epoch), best_head, best_head_loss,
        num_workers, seconds_per_epoch, label_change (share, last epoch), collapsed_heads (those that use fewer than
        half of their clusters).

    Raises:
        ResourceError: training would not fit into a worker's memory.
        WorkerError: the loss was not finite, or workers died more often than training is restarted.
    """
    num_images = load_features(training_set(context.inputs)).num_images
    work = partial(_train, config=config, inputs=dict(context.inputs), output=context.output)
    outcome = work_on_workers("method", work, config.resources, context.progress, num_images)
    for part in outcome["parts"]:
        context.output.add(part)
    CheckpointFolder.beside(context.output).clear()
    metrics: dict[str, Any] = outcome["metrics"]
    if metrics["collapsed_heads"]:
        heads = ", ".join(map(str, metrics["collapsed_heads"]))
        context.progress.note(f"heads {heads} collapsed into few clusters; the consensus does without them")
    return metrics | {"num_workers": config.resources.method.num_workers}


def _train(
    *,
    config: Config,
    inputs: dict[str, Artifact],
    output: ArtifactWriter,
    num_threads: int,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """What each worker does; that of rank 0 returns the parts and the stage's metrics."""
    # Here, because the driver imports this module too, and torch takes seconds.
    import torch

    from icce_ray.methods.heads import in_process as local
    from icce_ray.methods.heads.communicator import SingleWorker, TorchDistributed

    torch.set_num_threads(num_threads)
    communicator = SingleWorker() if config.resources.method.num_workers == 1 else TorchDistributed()
    context = StageContext(output, inputs, progress)
    try:
        trained = local.train(config, context, communicator=communicator, device=device)
    except ResourceError as error:
        raise ResourceError(f"heads: {error}") from None
    if communicator.rank != 0:
        return {}
    local.write_parts(trained, output)
    return {"parts": list(output.parts.values()), "metrics": trained.summary()}
