"""Plan a run: the fingerprint of each stage's result, where it lies, and whether it is finished.

Planning starts nothing and imports neither Ray nor torch, so a run that finds everything finished needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from icce_ray.config import Config
from icce_ray.count.stage import CLUSTER_COUNT
from icce_ray.errors import InputError
from icce_ray.pipeline.stages import stages_of
from icce_ray.stage import Stage
from icce_ray.store import Artifact, Folder, fingerprint
from icce_ray.store.s3 import check_bucket, is_s3, split_uri, use_s3


@dataclass(frozen=True)
class PlannedStage:
    """A stage of one run."""

    stage: Stage
    fingerprint: str
    input_fingerprints: dict[str, str]
    folder: Folder
    """Where its artifact lies, or will."""
    artifact: Artifact | None
    """None where it is not finished."""

    @property
    def name(self) -> str:
        return self.stage.name


def plan(
    config: Config, stages: tuple[Stage, ...] | None = None, given: Mapping[str, Artifact] | None = None
) -> list[PlannedStage]:
    """Plan the stages of a run in order. Only manifests are read.

    With ``num_clusters: auto`` the plan ends with the stage that chooses the number until that is finished.

    Args:
        config: the run's settings.
        stages: the stages to plan; all those of the run when None.
        given: finished artifacts that the stages build on, by stage name.

    Raises:
        InputError: the input does not exist or cannot be listed, or the output cannot be read.
    """
    connect_storage(config)
    identities = {name: artifact.identity for name, artifact in (given or {}).items()}
    root = Folder.at(config.output)
    planned: list[PlannedStage] = []
    for stage in stages_of(config) if stages is None else stages:
        inputs = {name: identities[name] for name in stage.inputs}
        settings = stage.settings(stage.config_of(config))
        own = fingerprint(stage.name, stage.version, settings, inputs)
        folder = root / stage.name / own
        try:
            artifact = Artifact.find(folder)
        except OSError as error:
            raise InputError(f"output: {config.output!r} cannot be read: {error}") from None
        identities[stage.name] = own if artifact is None else artifact.identity
        planned.append(PlannedStage(stage, own, inputs, folder, artifact))
        if stage.name == CLUSTER_COUNT.name:
            if artifact is None:
                break
            config = with_chosen_number(config, artifact)
    return planned


def is_complete(planned: list[PlannedStage]) -> bool:
    """Whether all stages of the run are planned, because the number of clusters is known."""
    return planned[-1].name != CLUSTER_COUNT.name


def with_chosen_number(config: Config, counted: Artifact) -> Config:
    """`config` with the number of clusters that `counted`, a finished `cluster_count`, chose."""
    return config.with_num_clusters(counted.metrics["num_clusters"])


def finished_artifacts(planned: list[PlannedStage]) -> dict[str, Artifact]:
    """The artifacts of the stages that are finished, by stage name."""
    return {step.name: step.artifact for step in planned if step.artifact is not None}


def fingerprints_of(planned: list[PlannedStage]) -> dict[str, str]:
    """The fingerprint of each stage, by its name."""
    return {step.name: step.fingerprint for step in planned}


def run_name(planned: list[PlannedStage]) -> str:
    """A short hash of everything that determines a run."""
    return fingerprint("run", 1, {}, fingerprints_of(planned))[:10]


def connect_storage(config: Config) -> None:
    """Use the config's storage options in this process. Fails within seconds if a bucket does not exist or refuses
    access."""
    use_s3(config.storage)
    places = [("output", config.output), *(("images.uri", uri) for uri in config.images.uris)]
    seen = set()
    for setting, uri in places:
        if is_s3(uri) and (bucket := split_uri(uri)[0]) not in seen:
            seen.add(bucket)
            check_bucket(uri, config.storage, setting)
