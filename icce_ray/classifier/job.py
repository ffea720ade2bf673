"""The classifier stage on Ray. One worker: an actor trains, this process tells how far it is. Several: Ray Train, each
worker trains its share of the grid on all images, and they exchange nothing but their best.

Parts: classifier.safetensors (the model), classifier.json (what it is, and how to embed a new image for it) and, where
the backbone's weights came from a file, that file. The folder as it is can be copied to another machine and used there:
see :func:`icce_ray.load`.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import uuid
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from icce_ray.classifier.linear import DESCRIPTION_NAME, MODEL_NAME, LinearClassifier
from icce_ray.classifier.self_training import SelfTraining
from icce_ray.cluster import connect, wait_for_machines, worker_cpus
from icce_ray.config import Config
from icce_ray.context import StageContext
from icce_ray.embed.backbone import RANDOM_WEIGHTS, embed_settings
from icce_ray.embed.features import load_features
from icce_ray.errors import InputError, WorkerError, describe_cause
from icce_ray.heads.job import HostsTorchConfig, fit_in_thread, relayed_progress
from icce_ray.progress import BoardProgress, Progress, ProgressBoard
from icce_ray.sample.draw import training_set
from icce_ray.store import Artifact, ArtifactWriter

VERSION = 2
MAX_RESTARTS = 3
POLL_INTERVAL_S = 1.0
LIBRARIES = ("icce_ray", "numpy", "torch", "timm", "scipy")


class Trainer:
    """The actor. Two calls at a time: one trains, one asks how far it is."""

    def __init__(self, config: Config, embed: Artifact, consensus: Artifact, num_threads: int) -> None:
        self.config = config
        self.embed = embed
        self.consensus = consensus
        self.num_threads = num_threads
        self.progress = _Counter()

    def __repr__(self) -> str:
        return "classifier: trainer"

    def fit(self) -> bytes:
        training = _prepare(self.config, self.embed, self.consensus, self.num_threads)
        everything = range(len(self.config.classifier.learning_rates))
        candidate = training.train(everything, device=_device(self.config), progress=self.progress)
        return training.finish([candidate]).to_bytes()

    def done(self) -> tuple[int, int]:
        return self.progress.done, self.progress.total


class _Counter(Progress):
    """Remembers instead of printing."""

    def __init__(self) -> None:
        super().__init__("classifier", quiet=True)
        self.done, self.total = 0, 0

    def update(self, done: int, total: int, note: str = "", num_errors: int = 0) -> None:
        self.done, self.total = done, total


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
    num_workers = min(config.resources.classifier.num_workers, len(config.classifier.learning_rates))
    train = _train_in_one_process if num_workers == 1 else _train_in_several
    data = train(config, embed, consensus, context.progress)
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


def _prepare(config: Config, embed: Artifact, consensus: Artifact, num_threads: int) -> SelfTraining:
    import torch

    torch.set_num_threads(num_threads)
    return SelfTraining(
        load_features(embed).matrix,
        consensus.read_array("labels.npy"),
        config.classifier,
        num_clusters=config.num_clusters,
        seed=config.seed,
        outlier_quantile=config.assign.outlier_quantile,
    )


def _device(config: Config) -> str:
    return "cuda" if config.resources.classifier.gpus_per_worker else "cpu"


def _train_in_one_process(config: Config, embed: Artifact, consensus: Artifact, progress: Progress) -> bytes:
    resources = config.resources.classifier
    cpus = worker_cpus(resources)
    actor: Any = ray.remote(Trainer).options(
        num_cpus=cpus,
        num_gpus=min(1.0, resources.gpus_per_worker),
        max_restarts=MAX_RESTARTS,
        max_task_retries=MAX_RESTARTS,
        max_concurrency=2,
    )
    trainer = actor.remote(config, embed, consensus, max(1, int(cpus)))
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


def _train_in_several(config: Config, embed: Artifact, consensus: Artifact, progress: Progress) -> bytes:
    resources = config.resources.classifier
    cpus = worker_cpus(resources)
    board = ray.remote(ProgressBoard).options(num_cpus=0, max_restarts=-1).remote("classifier")
    each = {"CPU": cpus} | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {})
    with tempfile.TemporaryDirectory(prefix="icce_ray-train-") as storage:
        trainer = TorchTrainer(
            _train_share,  # type: ignore[arg-type]  # what it returns is `return_value` below
            train_loop_config={
                "config": config,
                "embed": embed,
                "consensus": consensus,
                "board": board,
                "num_threads": max(1, int(cpus)),
            },
            # Gloo on GPUs too: it carries one small object at the end.
            torch_config=HostsTorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(
                num_workers=min(resources.num_workers, len(config.classifier.learning_rates)),
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker=each,
            ),
            run_config=RunConfig(
                # Ray Train resumes a run of the same name by itself, with its own idea of what was done.
                name=f"classifier-{uuid.uuid4().hex[:12]}",
                storage_path=storage,
                failure_config=FailureConfig(max_failures=MAX_RESTARTS),
            ),
        )
        try:
            with relayed_progress(board, progress):
                outcome = fit_in_thread(trainer)
        except ray.train.TrainingFailedError as error:
            raise WorkerError(
                f"classifier: training ended {MAX_RESTARTS + 1} times: {describe_cause(error)}"
            ) from error
    if "mistake" in outcome:
        raise InputError(outcome["mistake"])
    data: bytes = outcome["classifier"]
    return data


def _train_share(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker does; that of rank 0 returns the classifier."""
    import torch.distributed as dist

    config: Config = settings["config"]
    rank, num_workers = dist.get_rank(), dist.get_world_size()
    share = range(rank, len(config.classifier.learning_rates), num_workers)
    try:
        training = _prepare(config, settings["embed"], settings["consensus"], settings["num_threads"])
        progress = BoardProgress(settings["board"]) if rank == 0 else None
        candidates: list[Any] = [None] * num_workers
        dist.all_gather_object(candidates, training.train(share, device=_device(config), progress=progress))
        return {"classifier": training.finish(candidates).to_bytes()} if rank == 0 else {}
    except InputError as error:
        # As a value: an exception would be retried, and come again. All workers meet the same one.
        return {"mistake": str(error)}
