"""Time the stages after the embedding on a small collection that looks like the real one, and scale the times up.

The pilot's images are mixtures of two images of the sample, at most MAX_IMAGES of them. It is run twice with few
epochs, so that the cost of an epoch is known apart from that of starting. Most stages grow with the number of images,
the search for neighbours with its square; the classifier takes a fixed number of steps, and the scores without labels
and the page a sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.config import Config
from icce_ray.count.clustering import numbers_to_try
from icce_ray.methods import METHODS
from icce_ray.methods.heads.pair_batches import choose_batch_size, num_steps_per_epoch
from icce_ray.pipeline.plan import plan
from icce_ray.pipeline.run import run_pipeline
from icce_ray.runtime.machine import usable_cpus
from icce_ray.runtime.ray_cluster import run_here

MAX_IMAGES = 2_000
FEW_EPOCHS, MORE_EPOCHS = 1, 4
SHARE_OF_A_NUMBER = 1 / 8
"""The time that each number tried by `num_clusters: auto` adds, as a share of the time for a single one."""
GUESSED_CLUSTERS = 20
"""Number of clusters that later stages are timed with, when it is still to be chosen."""
GROWTH = {"sample": 2, "neighbors": 2, "classifier": 0, "evaluate": 0, "report": 0}
"""Powers of the number of images that the time of a stage grows with; 1 for the others."""
STAGES_ON_ALL = ("assign", "evaluate", "report")
"""The others see only the images that are trained on."""


@dataclass(frozen=True)
class PilotRun:
    """Time and storage that the pilot took, scaled up."""

    num_images: int
    num_clusters: int
    seconds: Mapping[str, float]
    """Seconds of the whole run by stage, without the stages `images` and `embed`."""
    disk_bytes: Mapping[str, int]
    """The same for storage."""
    mean_neighbors: float
    """0 for a method without a neighbour graph."""


def run_pilot(
    config: Config, features_nD: npt.NDArray[Any], *, num_images: int, folder: Path, num_parallel: float = 1.0
) -> PilotRun:
    """Run the stages after the embedding on a pilot, in this process, with its files in `folder`. `features_nD` are at
    least two rows of a sample of `num_images`; `num_parallel` of the tasks that choose the number run at a time."""
    num_trained = min(num_images, config.sample.max_images or num_images)
    num_pilot = min(num_trained, MAX_IMAGES)
    np.save(folder / "pilot.npy", _mixtures(features_nD, num_pilot, config.seed))
    seconds, longer = dict[str, float](), dict[str, float]()
    for epochs, found in ((FEW_EPOCHS, seconds), (MORE_EPOCHS, longer)):
        pilot = _pilot_config(config, folder, num_pilot, num_trained, epochs)
        with run_here(usable_cpus()):
            found |= run_pipeline(pilot, quiet=True).seconds
        if not trains_heads(config):
            break
    if longer:
        an_epoch = max(0.0, longer["method"] - seconds["method"]) / (MORE_EPOCHS - FEW_EPOCHS)
        batch_size = _batch_size(config, num_trained, num_pilot)
        steps = [num_steps_per_epoch(number, batch_size) for number in (num_pilot, num_trained)]
        starting = max(0.0, seconds["method"] - FEW_EPOCHS * an_epoch)
        seconds["method"] = starting + config.heads.num_epochs * an_epoch * steps[1] / steps[0]
    counted = seconds.pop("cluster_count", None)
    artifacts = {step.name: step.artifact for step in plan(pilot) if step.artifact is not None}
    growth = num_trained / num_pilot, num_images / num_pilot
    scaled = {
        name: spent * (1.0 if name == "method" and longer else growth[name in STAGES_ON_ALL] ** GROWTH.get(name, 1))
        for name, spent in seconds.items()
        if name not in ("images", "embed")
    }
    if counted is not None:
        asked = config.cluster_count
        tried, images = len(numbers_to_try(asked, num_trained)), min(num_trained, asked.max_images)
        spent = counted * (1 + SHARE_OF_A_NUMBER * tried) * images / num_pilot
        scaled = {"cluster_count": spent / min(num_parallel, asked.num_seeds), **scaled}
    graph = artifacts.get("neighbors")
    # A pilot of a few images has fewer neighbours than there will be.
    mean_neighbors = 0.0 if graph is None else graph.metrics["mean_neighbors"] * growth[0]
    limit, made = config.neighbors.max_neighbors, [name for name in scaled if name in artifacts]
    return PilotRun(
        num_images=num_pilot,
        num_clusters=artifacts["assign"].metrics["num_clusters_used"],
        seconds=scaled,
        disk_bytes={name: round(artifacts[name].num_bytes() * _disk_growth(name, *growth)) for name in made},
        mean_neighbors=mean_neighbors if limit is None else min(mean_neighbors, limit),
    )


def _mixtures(features_nD: npt.NDArray[Any], num_images: int, seed: int) -> npt.NDArray[np.float32]:
    """Random points between pairs of rows: no two are equal, and clusters stay what they are."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, len(features_nD), (2, num_images))
    share = rng.uniform(0.6, 1.0, (num_images, 1)).astype(np.float32)
    rows: npt.NDArray[np.float32] = features_nD.astype(np.float32)
    mixed: npt.NDArray[np.float32] = share * rows[first] + (1 - share) * rows[second]
    return mixed


def _pilot_config(config: Config, folder: Path, num_pilot: int, num_trained: int, epochs: int) -> Config:
    data = config.model_dump(exclude_unset=True)
    kept = {name: data[name] for name in data if name not in ("images", "embed", "evaluate", "resources", "storage")}
    kept |= {"embeddings": {"uri": str(folder / "pilot.npy")}, "output": str(folder / "pilot")}
    kept["sample"] = {**kept.get("sample", {}), "max_images": None}
    if config.sample.duplicate_threshold is not None:  # search, but find none: mixtures of the same images are near
        kept["sample"]["duplicate_threshold"] = 1.0
    if config.is_auto:
        clusters = max(2, min(GUESSED_CLUSTERS, num_pilot // 10))
        only = {"min_clusters": clusters, "max_clusters": clusters}
        kept["cluster_count"] = {**kept.get("cluster_count", {}), **only}
    else:
        kept["num_clusters"] = min(config.num_clusters, max(2, num_pilot // 4))
    if trains_heads(config):
        batch_size = _batch_size(config, num_trained, num_pilot)
        kept["heads"] = {**kept.get("heads", {}), "num_epochs": epochs, "batch_size": batch_size}
    return Config.model_validate(kept)


def trains_heads(config: Config) -> bool:
    return any(METHODS[method].section == "heads" for method in config.methods)


def _batch_size(config: Config, num_trained: int, num_pilot: int) -> int:
    return min(choose_batch_size(num_trained, config.heads.batch_size), num_pilot)


def _disk_growth(stage: str, trained: float, images: float) -> float:
    if stage in ("classifier", "report", "evaluate", "cluster_count"):
        return 1.0
    if stage == "neighbors":
        return trained**2  # more images, and more neighbours of each
    return images if stage in STAGES_ON_ALL else trained
