"""The classifier stage on Ray: one actor trains, this process tells how far it is.

Parts: classifier.safetensors (the model) and classifier.json (what it is, and how to embed a new image for it).
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
import ray

from icce_ray.classifier.linear import LinearClassifier, fit_classifier
from icce_ray.cluster import connect, worker_cpus
from icce_ray.config import Config
from icce_ray.context import StageContext
from icce_ray.embed.backbone import embed_settings
from icce_ray.embed.features import load_features
from icce_ray.errors import WorkerError
from icce_ray.progress import Progress
from icce_ray.sample.draw import training_set
from icce_ray.store import Artifact

VERSION = 1
MODEL_NAME = "classifier.safetensors"
DESCRIPTION_NAME = "classifier.json"
MAX_RESTARTS = 3
POLL_INTERVAL_S = 1.0
LIBRARIES = ("icce_ray", "numpy", "torch", "timm", "scipy")


class Trainer:
    """The actor. Two calls at a time: one trains, one asks how far it is."""

    def __init__(self, config: Config, embed: Artifact, consensus: Artifact, num_threads: int, device: str) -> None:
        self.config = config
        self.embed = embed
        self.consensus = consensus
        self.num_threads = num_threads
        self.device = device
        self.progress = _Counter()

    def fit(self) -> bytes:
        import torch

        torch.set_num_threads(self.num_threads)
        classifier = fit_classifier(
            load_features(self.embed).matrix,
            self.consensus.read_array("labels.npy"),
            self.config.classifier,
            num_clusters=self.config.num_clusters,
            seed=self.config.seed,
            outlier_quantile=self.config.assign.outlier_quantile,
            progress=self.progress,
            device=self.device,
        )
        return classifier.to_bytes()

    def done(self) -> tuple[int, int]:
        return self.progress.done, self.progress.total


class _Counter(Progress):
    """Remembers instead of printing."""

    def __init__(self) -> None:
        super().__init__("classifier", quiet=True)
        self.done, self.total = 0, 0

    def update(self, done: int, total: int, note: str = "") -> None:
        self.done, self.total = done, total


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Train the classifier on the features and the consensus.

    Returns:
        learning_rate (chosen), num_diverged (settings dropped), num_holdout, holdout_agreement, temperature,
        confidence_floor, ece, outlier_threshold.

    Raises:
        InputError: every learning rate diverged.
        WorkerError: the actor died more often than it is restarted.
    """
    connect(config.resources)
    embed, consensus = training_set(context.inputs), context.inputs["consensus"]
    data = _train(config, embed, consensus, context.progress)
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
    context.output.write_json(DESCRIPTION_NAME, describe(config, classifier, embed, consensus) | metrics)
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
        "cluster_sizes": sizes_K.tolist(),
        "cluster_agreement": (agreement_K / np.maximum(sizes_K, 1)).round(6).tolist(),
        "feature_set": embed.metrics.get("feature_set"),
        "embed": config.embed.model_dump(mode="json"),
        "embed_identity": embed_settings(config),
        "embeddings": config.embeddings.model_dump(mode="json"),
        "outlier_rule": (
            f"outlier_score > outlier_threshold, the {config.assign.outlier_quantile} quantile of the images trained "
            "on; the score is the squared Mahalanobis distance to the nearest cluster mean, over num_dims"
        ),
        "fingerprints": {"embed": embed.fingerprint, "consensus": consensus.fingerprint},
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _train(config: Config, embed: Artifact, consensus: Artifact, progress: Progress) -> bytes:
    resources = config.resources.heads
    cpus = worker_cpus(resources)
    actor: Any = ray.remote(Trainer).options(
        num_cpus=cpus,
        num_gpus=min(1.0, resources.gpus_per_worker),
        max_restarts=MAX_RESTARTS,
        max_task_retries=MAX_RESTARTS,
        max_concurrency=2,
    )
    device = "cuda" if resources.gpus_per_worker else "cpu"
    trainer = actor.remote(config, embed, consensus, max(1, int(cpus)), device)
    try:
        fitted = trainer.fit.remote()
        while not ray.wait([fitted], timeout=POLL_INTERVAL_S)[0]:
            asked = trainer.done.remote()
            if ray.wait([asked], timeout=POLL_INTERVAL_S)[0]:
                done, total = ray.get(asked)
                if total:
                    progress.update(done, total)
        data: bytes = ray.get(fitted)
    except ray.exceptions.RayActorError as error:
        raise WorkerError(
            f"classifier: its process died {MAX_RESTARTS + 1} times ({' '.join(str(error).split())[:300]}). Out of "
            "memory is the usual cause: give it a machine with more"
        ) from error
    finally:
        ray.kill(trainer)
    return data
