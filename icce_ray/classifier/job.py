"""The classifier stage on Ray: each worker trains its share of the learning rates on all images.

One worker is an actor. Several are started by Ray Train and exchange nothing but their best classifier.
"""

from functools import partial
from typing import Any

from icce_ray.classifier.linear import LinearClassifier
from icce_ray.classifier.model_folder import write_model
from icce_ray.classifier.self_training import SelfTraining
from icce_ray.config import Config
from icce_ray.corrections.stage import consensus_of, num_clusters_of
from icce_ray.embed.feature_matrix import load_features
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.workers import work_on_workers
from icce_ray.sample.training_set import training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Train the classifier on the features and the consensus, and write the model folder. Returns the metrics of
    :func:`~icce_ray.classifier.model_folder.write_model`. Raises InputError: every learning rate diverged; WorkerError:
    workers died more often than they are restarted."""
    embed, consensus = training_set(context.inputs), consensus_of(context.inputs)
    data: bytes = work_on_workers(
        "classifier",
        partial(_train, config, embed, consensus, num_clusters_of(config, context.inputs)),
        config.resources,
        context.progress,
        num_images=load_features(embed).num_images,
        max_workers=len(config.classifier.learning_rates),
        backend="gloo",  # on GPUs too: all it carries is one small object at the end
    )
    return write_model(context.output, LinearClassifier.from_bytes(data), config, embed, consensus)


def _train(
    config: Config,
    embed: Artifact,
    consensus: Artifact,
    num_clusters: int,
    *,
    num_threads: int,
    device: str,
    progress: Progress,
) -> bytes | None:
    """The work of one worker. The worker of rank 0 returns the classifier."""
    # Imported here because the driver imports this module too, and torch takes seconds.
    import torch
    import torch.distributed as dist

    torch.set_num_threads(num_threads)
    training = SelfTraining(
        load_features(embed).matrix,
        consensus.read_array("labels.npy"),
        config.classifier,
        num_clusters=num_clusters,
        seed=config.seed,
        outlier_quantile=config.assign.outlier_quantile,
    )
    is_alone = not dist.is_initialized()
    rank, num_workers = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
    positions = range(rank, len(config.classifier.learning_rates), num_workers)
    best = training.train(positions, device=device, progress=progress)
    candidates: list[Any] = [best] * num_workers
    if not is_alone:
        dist.all_gather_object(candidates, best)
    return training.finish(candidates).to_bytes() if rank == 0 else None
