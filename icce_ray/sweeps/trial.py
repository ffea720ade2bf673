"""One trial: the stages of the pipeline up to the consensus, then the scores, in one run for each seed.

Artifacts are where the pipeline puts them, under their fingerprints. So trials share the stages they have in common, a
second sweep uses those of the first, and `icce-ray run` finds a trial's clusterings finished. A trial waits for a stage
that another is making.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from icce_ray.config import Config
from icce_ray.consensus.other_runs import IMAGE_IDS_NAME
from icce_ray.errors import BusyError, UserError, describe_cause, find_cause
from icce_ray.images.stage import IMAGES
from icce_ray.pipeline.plan import finished_artifacts, is_complete, plan, stages_of, with_chosen_number
from icce_ray.pipeline.run import run_stages
from icce_ray.stage import Stage
from icce_ray.store import Artifact
from icce_ray.sweeps.silhouette_spaces import spaces

POLL_S = 1.0
"""How often a trial looks for a stage that another is making."""
SHARED = ("images", "embed", "sample", "neighbors")
"""Stages that many trials have in common."""
OWN = ("method", "consensus")

SPACES = Stage(
    "silhouette_spaces",
    "icce_ray.sweeps.silhouette_spaces",
    1,
    ("embed", "sample"),
    lambda config: {"spaces": spaces()},
    "spaces",
)
SCORES = Stage(
    "trial_scores", "icce_ray.sweeps.trial_scores", 1, ("embed", "sample", "consensus", SPACES.name), lambda config: {}
)


@dataclass
class Listings:
    """The settings of the `images` stage, computed once for each place: listing a million files takes a while, and all
    trials must see the same."""

    known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, config: Config) -> dict[str, Any]:
        places = {"images": config.images.model_dump(mode="json"), "embeddings": config.embeddings.model_dump()}
        key = json.dumps(places, sort_keys=True)
        if key not in self.known:
            self.known[key] = IMAGES.settings(config)
        return self.known[key]


@dataclass(frozen=True)
class RunOutcome:
    """The result of one run of a trial."""

    seed: int
    metrics: dict[str, float | None]
    num_clusters_used: int
    seconds: float
    """Time spent on the method, the consensus and the scores, whichever trial made them."""
    artifacts: dict[str, Artifact]


def full_stages(config: Config, listings: Listings) -> tuple[Stage, ...]:
    """The stages of a whole job with this config, for its name and its record."""
    return tuple(
        replace(stage, settings=listings) if stage.name == IMAGES.name else stage for stage in stages_of(config)
    )


def shared_stages(config: Config, listings: Listings) -> tuple[Stage, ...]:
    """The stages that are made before the trials start, each once."""
    return (*(stage for stage in full_stages(config, listings) if stage.name in SHARED), SPACES)


def trial_stages(config: Config, listings: Listings) -> tuple[Stage, ...]:
    """The shared stages, then the trial's own."""
    own = (stage for stage in full_stages(config, listings) if stage.name in OWN)
    return (*shared_stages(config, listings), *own, SCORES)


def make(config: Config, stages: tuple[Stage, ...], *, quiet: bool = True) -> dict[str, Artifact]:
    """The artifacts of `stages`: the missing ones are made now, in order. Those that another trial or job is making are
    waited for."""
    while True:
        planned = plan(config, stages)
        artifacts = finished_artifacts(planned)
        try:
            run_stages(with_chosen_number(config, planned, artifacts), planned, artifacts, quiet)
        except BusyError:
            time.sleep(POLL_S)
        else:
            if is_complete(planned):
                return artifacts


def is_finished(config: Config, listings: Listings) -> bool:
    """Whether all stages of a run are finished, so that :func:`run` only reads."""
    planned = plan(config, trial_stages(config, listings))
    return is_complete(planned) and all(step.artifact is not None for step in planned)


def run(config: Config, listings: Listings) -> RunOutcome:
    """Do one run of a trial."""
    artifacts = make(config, trial_stages(config, listings))
    metrics = dict(artifacts[SCORES.name].metrics)
    return RunOutcome(
        seed=config.seed,
        num_clusters_used=metrics.pop("num_clusters_used"),
        metrics=metrics,
        seconds=sum(artifacts[name].manifest.seconds for name in (*OWN, SCORES.name)),
        artifacts=artifacts,
    )


def combine(outcomes: Sequence[RunOutcome]) -> dict[str, float | None]:
    """The metrics of a trial: means over its runs, None where a run has no value. With several runs also their standard
    deviations (`<metric>_std`), and `stability`, the mean NMI of the clusters of two runs."""
    metrics: dict[str, float | None] = {}
    for name in outcomes[0].metrics:
        values: list[Any] = [outcome.metrics[name] for outcome in outcomes]
        is_known = None not in values
        metrics[name] = float(np.mean(values)) if is_known else None
        if len(outcomes) > 1:
            metrics[f"{name}_std"] = float(np.std(values)) if is_known else None
    if len(outcomes) > 1:
        pairs = [consensus_nmi(one.artifacts, other.artifacts) for one, other in combinations(outcomes, 2)]
        metrics |= {"stability": float(np.mean(pairs)), "stability_std": float(np.std(pairs))}
    return metrics


def consensus_nmi(one: Mapping[str, Artifact], other: Mapping[str, Artifact]) -> float:
    """NMI of the clusters of two runs, given by their artifacts, over the images that both were trained on."""
    from icce_ray.metrics.true_label_scores import normalized_mutual_info

    found = [artifacts["consensus"] for artifacts in (one, other)]
    ids, other_ids = (consensus.read_array(IMAGE_IDS_NAME) for consensus in found)
    _, *rows = np.intersect1d(ids, other_ids, assume_unique=True, return_indices=True)
    labels, other_labels = (
        consensus.read_array("labels.npy")[rows_n] for consensus, rows_n in zip(found, rows, strict=True)
    )
    return normalized_mutual_info(labels, other_labels)


def key_of(parameters: Mapping[str, Any]) -> str:
    """Equal for equal parameters."""
    return json.dumps(parameters, sort_keys=True)


def reason_of(error: BaseException) -> str:
    """Why something failed, in one line."""
    return str(find_cause(error, UserError) or describe_cause(error))
