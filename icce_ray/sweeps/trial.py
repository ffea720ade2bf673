"""What a trial does: the stages of the pipeline up to the consensus, then the metrics, one run for each seed.

Every stage is named by its fingerprint and lies where the pipeline puts it. So trials that have a stage in common use
the same artifact, a second sweep uses those of the first, and `icce-ray run` on a trial's config finds its heads done.
A stage that another trial is making at the moment is waited for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from icce_ray.config import Config
from icce_ray.embed.feature_matrix import load_features
from icce_ray.errors import BusyError
from icce_ray.images.stage import IMAGES
from icce_ray.pipeline.plan import plan
from icce_ray.pipeline.run import run_stages
from icce_ray.pipeline.stages import stages_of
from icce_ray.sample.training_set import training_rows
from icce_ray.stage import Stage
from icce_ray.store import Artifact
from icce_ray.sweeps.silhouette_spaces import spaces

POLL_S = 1.0
SHARED = ("images", "embed", "sample", "neighbors")
"""Stages that many trials have in common."""
TRAINED = ("method", "consensus")
WITHOUT_RAY = {
    "icce_ray.methods.heads.job": "icce_ray.methods.heads.heads_artifact",
    "icce_ray.consensus.job": "icce_ray.consensus.consensus_artifact",
}
"""Modules that make a stage's artifact in this process."""
NOT_METRICS = ("num_clusters_used",)

PROJECTION = Stage(
    "projection",
    "icce_ray.sweeps.silhouette_spaces",
    1,
    ("embed", "sample"),
    lambda config: {"spaces": spaces()},
    "spaces",
)
PROXIES = Stage(
    "proxies", "icce_ray.sweeps.trial_scores", 1, ("embed", "sample", "consensus", "projection"), lambda config: {}
)


@dataclass
class Listings:
    """The settings of the `images` stage, looked up once for each place: listing a million files takes a while, and
    all trials are to see the same."""

    known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, config: Config) -> dict[str, Any]:
        places = {"images": config.images.model_dump(mode="json"), "embeddings": config.embeddings.model_dump()}
        key = json.dumps(places, sort_keys=True)
        if key not in self.known:
            self.known[key] = IMAGES.settings(config)
        return self.known[key]


@dataclass(frozen=True)
class RunOutcome:
    """What one run of a trial ended with."""

    seed: int
    metrics: dict[str, float | None]
    num_clusters_used: int
    seconds: float
    """Of its heads, its consensus and its metrics, by whichever trial made them."""
    labels: Artifact
    """The consensus."""
    embed: Mapping[str, Artifact]
    """`embed` and `sample`."""


def full_stages(config: Config, listings: Listings) -> tuple[Stage, ...]:
    """The stages of a whole job with this config, for its name and its record."""
    return tuple(
        replace(stage, settings=listings) if stage.name == IMAGES.name else stage for stage in stages_of(config)
    )


def shared_stages(config: Config, listings: Listings) -> tuple[Stage, ...]:
    """The stages that are made before the trials start, each once."""
    return (*(stage for stage in full_stages(config, listings) if stage.name in SHARED), PROJECTION)


def stages_of_trial(config: Config, listings: Listings, in_one_process: bool) -> tuple[Stage, ...]:
    """The shared stages, then the trial's own. In one process the same maths runs as in the distributed stages, so
    results and fingerprints are the same too."""
    own = [stage for stage in full_stages(config, listings) if stage.name in TRAINED]
    if in_one_process:
        own = [replace(stage, module=WITHOUT_RAY[stage.module]) for stage in own]
    return (*shared_stages(config, listings), *own, PROXIES)


def make(config: Config, stages: tuple[Stage, ...], *, quiet: bool = True) -> dict[str, Artifact]:
    """The artifacts of `stages`: those that are finished, and the others made now, in order. What another trial, or
    another job, is making is waited for."""
    while True:
        planned = plan(config, stages)
        artifacts = {step.name: step.artifact for step in planned if step.artifact is not None}
        try:
            run_stages(config, planned, artifacts, quiet)
        except BusyError:
            time.sleep(POLL_S)
        else:
            return artifacts


def run(config: Config, listings: Listings, in_one_process: bool) -> RunOutcome:
    """Do all of one run."""
    artifacts = make(config, stages_of_trial(config, listings, in_one_process))
    metrics = dict(artifacts["proxies"].metrics)
    own = (*TRAINED, "proxies")
    return RunOutcome(
        seed=config.seed,
        num_clusters_used=metrics.pop("num_clusters_used"),
        metrics=metrics,
        seconds=sum(artifacts[name].manifest.seconds for name in own),
        labels=artifacts["consensus"],
        embed={name: artifacts[name] for name in ("embed", "sample")},
    )


def combine(outcomes: Sequence[RunOutcome]) -> dict[str, float | None]:
    """The metrics of a trial: means over its runs, and with several the deviations (`<metric>_std`) and `stability`."""
    metrics = mean_metrics([outcome.metrics for outcome in outcomes])
    if len(outcomes) > 1:
        for name in list(metrics):
            values = [outcome.metrics[name] for outcome in outcomes]
            known = [value for value in values if value is not None]
            metrics[f"{name}_std"] = float(np.std(known)) if len(known) == len(values) else None
        pairs = stabilities(outcomes)
        metrics |= {"stability": float(np.mean(pairs)), "stability_std": float(np.std(pairs))}
    return metrics


def mean_metrics(runs: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Means over runs; None where any of them could not tell."""
    means: dict[str, float | None] = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        known = [value for value in values if value is not None]
        means[name] = float(np.mean(known)) if len(known) == len(values) else None
    return means


def stabilities(outcomes: Sequence[RunOutcome]) -> list[float]:
    """NMI of the clusters of each two runs, over the images that both were trained on."""
    from icce_ray.metrics.true_label_scores import normalized_mutual_info

    labels = [outcome.labels.read_array("labels.npy") for outcome in outcomes]
    training = [training_rows(outcome.embed) for outcome in outcomes]
    found = []
    for one in range(len(outcomes)):
        for other in range(one):
            if training[one] is None and training[other] is None:
                found.append(normalized_mutual_info(labels[one], labels[other]))
                continue
            mine, theirs = (
                load_features(outcomes[run].embed["embed"]).image_ids if rows is None else rows.image_ids_n
                for run, rows in ((one, training[one]), (other, training[other]))
            )
            _, rows, other_rows = np.intersect1d(mine, theirs, assume_unique=True, return_indices=True)
            found.append(normalized_mutual_info(labels[one][rows], labels[other][other_rows]))
    return found
