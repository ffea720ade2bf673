"""The model folder: the classifier artifact, complete enough to label images on another machine.

    classifier.safetensors    the classifier
    classifier.json           what it was made from, and how to embed a new image for it
    backbone.*                the backbone's weights, if they came from a file

:func:`icce_ray.load` reads it.
"""

import importlib.metadata
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from icce_ray.classifier.linear import DESCRIPTION_NAME, MODEL_NAME, LinearClassifier
from icce_ray.config import Config
from icce_ray.embed.backbone_plan import RANDOM_WEIGHTS, embed_settings
from icce_ray.store import Artifact, ArtifactWriter

LIBRARIES = ("icce_ray", "numpy", "torch", "timm", "scipy")


def write_model(
    output: ArtifactWriter, classifier: LinearClassifier, config: Config, embed: Artifact, consensus: Artifact
) -> dict[str, Any]:
    """Write the folder. Returns learning_rate (chosen), num_diverged (learning rates), num_holdout, holdout_agreement,
    temperature, probability_floor, ece, outlier_threshold.

    Args:
        embed: the embeddings that the classifier was trained on.
        consensus: its targets.
    """
    metrics = {
        "learning_rate": classifier.learning_rate,
        "num_diverged": classifier.num_diverged,
        "num_holdout": classifier.num_holdout,
        "holdout_agreement": classifier.holdout_agreement,
        "temperature": classifier.temperature,
        "probability_floor": classifier.probability_floor,
        "ece": classifier.ece,
        "outlier_threshold": classifier.outlier_threshold,
    }
    description = {
        "num_clusters": classifier.num_clusters,
        "num_dims": classifier.num_dims,
        "seed": config.seed,
        "cluster_sizes": classifier.cluster_sizes.tolist(),
        "cluster_agreement": _mean_agreement(consensus, classifier.num_clusters),
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


def _mean_agreement(consensus: Artifact, num_clusters: int) -> list[float]:
    """Mean agreement of each cluster, 0 for an empty one."""
    labels_N, agreement_N = consensus.read_array("labels.npy"), consensus.read_array("agreement.npy")
    voted = labels_N >= 0
    sums_K = np.bincount(labels_N[voted], weights=agreement_N[voted], minlength=num_clusters)
    sizes_K = np.bincount(labels_N[voted], minlength=num_clusters)
    means: list[float] = (sums_K / np.maximum(sizes_K, 1)).round(6).tolist()
    return means


def _copy_backbone(config: Config, output: ArtifactWriter) -> str | None:
    """Copy the backbone's weights file; returns its name in the folder, None if there is nothing to copy."""
    weights = config.embed.weights
    if config.embeddings.uri is not None or weights in (None, RANDOM_WEIGHTS) or not config.classifier.include_backbone:
        return None
    assert weights is not None
    name = f"backbone{PurePosixPath(weights).suffix}"
    output.copy_file(name, weights)
    return name
