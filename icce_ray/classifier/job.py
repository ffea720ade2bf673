"""The classifier stage on Ray: each worker trains its share of the learning rates on all images.

One worker is an actor. Several are started by Ray Train and exchange nothing but their best classifier. The artifact is
the model folder, complete enough to label images on another machine, where :func:`icce_ray.load` reads it:

    classifier.safetensors    the classifier
    classifier.json           what it was made from, and how to embed a new image for it
    backbone.*                the backbone's weights, if they came from a file
"""

import importlib.metadata
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from icce_ray.classifier.linear import DESCRIPTION_NAME, MODEL_NAME, LinearClassifier
from icce_ray.classifier.self_training import SelfTraining
from icce_ray.config import Config
from icce_ray.consensus.aligned_vote import mean_agreements
from icce_ray.corrections.stage import consensus_of, num_clusters_of
from icce_ray.embed.backbone_plan import RANDOM_WEIGHTS, embed_settings
from icce_ray.embed.feature_matrix import load_features
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.workers import work_on_workers
from icce_ray.sample.training_set import training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter

METRICS = (
    "learning_rate", "num_diverged", "num_holdout", "holdout_agreement", "temperature", "probability_floor", "ece",
    "outlier_threshold",
)  # fmt: skip
LIBRARIES = ("icce_ray", "numpy", "torch", "timm", "scipy")


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Train the classifier on the features and the consensus, and write the model folder. Returns the metrics of
    :func:`write_model`. Raises InputError: every learning rate diverged; WorkerError:
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


def write_model(
    output: ArtifactWriter, classifier: LinearClassifier, config: Config, embed: Artifact, consensus: Artifact
) -> dict[str, Any]:
    """Write the folder. Returns METRICS of the classifier, which was trained on `embed` to give the clusters of
    `consensus`."""
    metrics = {name: getattr(classifier, name) for name in METRICS}
    arrays = consensus.read_array("labels.npy"), consensus.read_array("agreement.npy")
    description = {
        "num_clusters": classifier.num_clusters,
        "num_dims": classifier.num_dims,
        "seed": config.seed,
        "cluster_sizes": classifier.cluster_sizes.tolist(),
        "cluster_agreement": mean_agreements(*arrays, classifier.num_clusters).round(6).tolist(),
        "feature_set": embed.metrics.get("feature_set"),
        "embed": config.embed.model_dump(mode="json"),
        "embed_identity": embed_settings(config.embed, config.embeddings, config.seed),
        "embeddings": config.embeddings.model_dump(mode="json"),
        "outlier_rule": (
            f"outlier_score > outlier_threshold, the {config.assign.outlier_quantile} quantile of the training images; "
            "the score is the squared Mahalanobis distance to the mean of the predicted cluster, divided by num_dims"
        ),
        "fingerprints": {"embed": embed.fingerprint, "consensus": consensus.fingerprint},
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "backbone_file": _copy_backbone(config, output),
    }
    output.write_bytes(MODEL_NAME, classifier.to_bytes())
    output.write_json(DESCRIPTION_NAME, description | metrics)
    return metrics


def _copy_backbone(config: Config, output: ArtifactWriter) -> str | None:
    """Copy the backbone's weights file; returns its name in the folder, None if there is nothing to copy."""
    weights = config.embed.weights
    if config.embeddings.uri is not None or weights in (None, RANDOM_WEIGHTS) or not config.classifier.include_backbone:
        return None
    assert weights is not None
    name = f"backbone{PurePosixPath(weights).suffix}"
    output.copy_file(name, weights)
    return name
