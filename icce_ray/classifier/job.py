"""The classifier stage on Ray. One worker is an actor. Several are Ray Train's: each trains its share of the grid on
all images, and they exchange nothing but their best.

Parts: classifier.safetensors (the model), classifier.json (what it is, and how to embed a new image for it) and, where
the backbone's weights came from a file, that file. The folder as it is can be copied to another machine and used there:
see :func:`icce_ray.load`.
"""

from __future__ import annotations

import importlib.metadata
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from icce_ray.classifier.linear import DESCRIPTION_NAME, MODEL_NAME, LinearClassifier
from icce_ray.classifier.self_training import SelfTraining
from icce_ray.config import Config
from icce_ray.embed.backbone import RANDOM_WEIGHTS, embed_settings
from icce_ray.embed.feature_matrix import load_features
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import connect, wait_for_machines
from icce_ray.runtime.workers import work_on_workers
from icce_ray.sample.draw import training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter

VERSION = 2
LIBRARIES = ("icce_ray", "numpy", "torch", "timm", "scipy")


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Train the classifier on the features and the consensus.

    Returns:
        learning_rate (chosen), num_diverged (settings dropped), num_holdout, holdout_agreement, temperature,
        confidence_floor, ece, outlier_threshold.

    Raises:
        InputError: every learning rate diverged.
        WorkerError: workers died more often than they are restarted.
    """
    connect(config.resources)
    wait_for_machines(config.resources, "classifier", context.progress.note)
    embed, consensus = training_set(context.inputs), context.inputs["consensus"]
    workers = config.resources.classifier
    num_workers = min(workers.num_workers, len(config.classifier.learning_rates))
    data: bytes = work_on_workers(
        "classifier",
        partial(_train, config, embed, consensus),
        workers.model_copy(update={"num_workers": num_workers}),
        context.progress,
        backend="gloo",  # on GPUs too: it carries one small object at the end
    )
    classifier = LinearClassifier.from_bytes(data)
    context.output.write_bytes(MODEL_NAME, data)
    metrics = {
        "learning_rate": classifier.learning_rate,
        "num_diverged": classifier.num_diverged,
        "num_holdout": classifier.num_holdout,
        "holdout_agreement": classifier.holdout_agreement,
        "temperature": classifier.temperature,
        "confidence_floor": classifier.confidence_floor,
        "ece": classifier.ece,
        "outlier_threshold": classifier.outlier_threshold,
    }
    backbone = {"backbone_file": _copy_backbone(config, context.output)}
    context.output.write_json(DESCRIPTION_NAME, describe(config, classifier, embed, consensus) | backbone | metrics)
    return metrics


def describe(config: Config, classifier: LinearClassifier, embed: Artifact, consensus: Artifact) -> dict[str, Any]:
    """All that is needed to label a new image with it, and what it was made from."""
    labels_N, agreement_N = consensus.read_array("labels.npy"), consensus.read_array("agreement.npy")
    voted = labels_N >= 0
    agreement_K = np.bincount(labels_N[voted], weights=agreement_N[voted], minlength=classifier.num_clusters)
    sizes_K = classifier.cluster_sizes
    return {
        "num_clusters": classifier.num_clusters,
        "num_dims": classifier.num_dims,
        "seed": config.seed,
        "cluster_sizes": sizes_K.tolist(),
        "cluster_agreement": (agreement_K / np.maximum(sizes_K, 1)).round(6).tolist(),
        "feature_set": embed.metrics.get("feature_set"),
        "embed": config.embed.model_dump(mode="json"),
        "embed_identity": embed_settings(config),
        "embeddings": config.embeddings.model_dump(mode="json"),
        "outlier_rule": (
            f"outlier_score > outlier_threshold, the {config.assign.outlier_quantile} quantile of the images trained "
            "on; the score is the squared Mahalanobis distance to the mean of the predicted cluster, over num_dims"
        ),
        "fingerprints": {"embed": embed.fingerprint, "consensus": consensus.fingerprint},
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _copy_backbone(config: Config, output: ArtifactWriter) -> str | None:
    """Put the weights file beside the model; its name there, or None where there is no file to copy."""
    weights = config.embed.weights
    if config.embeddings.uri is not None or weights in (None, RANDOM_WEIGHTS) or not config.classifier.include_backbone:
        return None
    assert weights is not None
    name = f"backbone{PurePosixPath(weights).suffix}"
    output.copy_file(name, weights)
    return name


def _train(
    config: Config, embed: Artifact, consensus: Artifact, *, num_threads: int, device: str, progress: Progress
) -> bytes | None:
    """What each worker does: it trains its share of the grid on all images. That of rank 0 returns the classifier."""
    # Here, because the driver imports this module too, and torch takes seconds.
    import torch
    import torch.distributed as dist

    torch.set_num_threads(num_threads)
    training = SelfTraining(
        load_features(embed).matrix,
        consensus.read_array("labels.npy"),
        config.classifier,
        num_clusters=config.num_clusters,
        seed=config.seed,
        outlier_quantile=config.assign.outlier_quantile,
    )
    is_alone = not dist.is_initialized()
    rank, num_workers = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
    share = range(rank, len(config.classifier.learning_rates), num_workers)
    found = training.train(share, device=device, progress=progress)
    candidates: list[Any] = [found] * num_workers
    if not is_alone:
        dist.all_gather_object(candidates, found)
    return training.finish(candidates).to_bytes() if rank == 0 else None
