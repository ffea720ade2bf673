"""The heads stage on Ray: each worker trains its share of the heads. One worker is an actor, several are Ray Train's.

A run that was killed goes on from the newest checkpoint, on any number of workers.
"""

from functools import partial
from typing import Any

from icce_ray.config import Config
from icce_ray.embed.feature_matrix import load_features
from icce_ray.errors import WorkerError
from icce_ray.methods.heads.division import HeadDivision
from icce_ray.neighbors.graph import load_graph
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.workers import work_on_workers
from icce_ray.sample.training_set import training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Train the heads: label_matrix.npy (H x N int32), heads.safetensors, clusterings.json (losses, collapsed_heads,
    history), all without the heads that collapsed. While it runs, and afterwards, metrics.jsonl shows every epoch. The
    number of workers does not change the result.

    Returns:
        num_heads, num_epochs, stopped_early, loss (mean over heads, last epoch), best_head, best_head_loss,
        num_workers, seconds_per_epoch, label_change (share, last epoch), collapsed_heads (those that use fewer than
        half of their clusters).

    Raises:
        ResourceError: there are more workers than heads, or training would not fit into a worker's memory.
        WorkerError: the loss was not finite, or workers died more often than training is restarted.
    """
    workers = config.resources.method
    HeadDivision.of(config.heads.num_heads, workers.num_workers, on_gpu=workers.gpus_per_worker > 0)
    num_images = load_features(training_set(context.inputs)).num_images
    work = partial(_work, config=config, inputs=dict(context.inputs), output=context.output)
    outcome = work_on_workers("method", work, config.resources, context.progress, num_images)
    for part in outcome["parts"]:
        context.output.add(part)
    metrics: dict[str, Any] = outcome["metrics"]
    if metrics["collapsed_heads"]:
        heads = ", ".join(map(str, metrics["collapsed_heads"]))
        context.progress.note(f"heads {heads} collapsed into few clusters; the consensus does without them")
    return metrics


def _work(
    *,
    config: Config,
    inputs: dict[str, Artifact],
    output: ArtifactWriter,
    num_threads: int,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """The work of one worker. The worker of rank 0 writes the files and returns the parts and the stage's metrics; the
    others return neither."""
    # Imported here: the driver imports this module too, and torch takes seconds.
    import torch

    from icce_ray.methods.heads.checkpoint import CheckpointFolder
    from icce_ray.methods.heads.communicator import SingleWorker, TorchDistributed
    from icce_ray.methods.heads.fit import fit, stage_metrics

    torch.set_num_threads(num_threads)
    communicator = TorchDistributed() if torch.distributed.is_initialized() else SingleWorker()
    try:
        clusterings = fit(
            load_features(training_set(inputs)).matrix,
            load_graph(inputs["neighbors"]),
            config.heads,
            num_clusters=config.num_clusters,
            seed=config.seed,
            device=device,
            progress=progress,
            folder=output.folder,
            communicator=communicator,
        )
    except FloatingPointError as error:
        raise WorkerError(f"heads: {error}") from error
    if communicator.rank != 0:
        return {}
    clusterings.write(output)
    CheckpointFolder(output.folder).clear()
    metrics = stage_metrics(clusterings) | {"num_workers": communicator.num_workers}
    return {"parts": list(output.parts.values()), "metrics": metrics}
