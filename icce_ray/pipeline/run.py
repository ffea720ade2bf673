"""The stages in order, and what it takes to run them: name each result, skip what is finished, run the rest, sum up.

Importing this starts nothing and imports neither Ray nor torch; a run that finds everything finished needs neither.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from icce_ray.config import Config, EvaluateConfig
from icce_ray.errors import DamagedArtifactError, InputError, find_cause
from icce_ray.pipeline.result import Result, num_failed, num_listed, remove_record, sum_up, summary, write_record
from icce_ray.pipeline.status import RunProgress
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Claim, Folder, fingerprint
from icce_ray.store.filesystem import open_uri
from icce_ray.store.s3 import check_bucket, is_s3, split_uri, use_s3

Settings = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One step of the flow.

    ``<module>.run(config, context) -> metrics`` does the work. `settings` returns all that determines its result
    besides its inputs; `version` is raised by hand when the code would make something else of the same settings.
    Where `sees_labels` is false, both get a config that does not say where the true labels are.
    """

    name: str
    module: str
    version: int
    inputs: tuple[str, ...]
    settings: Callable[[Config], Settings]
    unit: str = "images"
    sees_labels: bool = False

    def config_of(self, config: Config) -> Config:
        """`config` as this stage may see it."""
        return config if self.sees_labels else config.model_copy(update={"evaluate": EvaluateConfig()})


def _images_settings(config: Config) -> Settings:
    from icce_ray.images.listing import source_digest

    images = config.images.model_dump(exclude={"refresh"})
    given = {"images": images, "embeddings": config.embeddings.model_dump()}
    return given | {"source": source_digest(config)}


def _embed_settings(config: Config) -> Settings:
    from icce_ray.embed.backbone import embed_settings

    settings = embed_settings(config)
    settings.get("embed", {}).pop("retry_errors", None)  # an operation on the artifact, not a property of it
    return settings


def _sample_settings(config: Config) -> Settings:
    return {"max_images": config.heads.max_images, "seed": config.seed}


def _cluster_count_settings(config: Config) -> Settings:
    from icce_ray.count.settings import settings_of

    return settings_of(config)


def _neighbors_settings(config: Config) -> Settings:
    return _drawn(config) | {"neighbors": config.neighbors.model_dump()}


def _heads_settings(config: Config) -> Settings:
    return _drawn(config) | {"heads": config.heads.model_dump(exclude={"checkpoint_interval_s", "max_images"})}


def _consensus_settings(config: Config) -> Settings:
    return _drawn(config) | {"consensus": config.consensus.model_dump()}


def _classifier_settings(config: Config) -> Settings:
    outliers = {"outlier_quantile": config.assign.outlier_quantile}
    return _drawn(config) | {"classifier": config.classifier.model_dump()} | outliers


def _assign_settings(config: Config) -> Settings:
    return _drawn(config) | {"assign": config.assign.model_dump()}


def _evaluate_settings(config: Config) -> Settings:
    labels = config.evaluate.labels
    identity = None if labels in (None, "folder", "cls") else _file_identity(str(labels))
    return {"evaluate": config.evaluate.model_dump(), "file": identity}


def _report_settings(config: Config) -> Settings:
    return {"report": config.report.model_dump(), "num_clusters": config.num_clusters}


def _drawn(config: Config) -> Settings:
    return {"num_clusters": config.num_clusters, "seed": config.seed}


STAGES: tuple[Stage, ...] = (
    Stage("images", "icce_ray.images.listing", 2, (), _images_settings),
    Stage("embed", "icce_ray.embed.job", 3, ("images",), _embed_settings),
    Stage("sample", "icce_ray.sample.job", 1, ("embed",), _sample_settings),
    Stage("neighbors", "icce_ray.neighbors.job", 5, ("embed", "sample"), _neighbors_settings),
    Stage("heads", "icce_ray.methods.heads.job", 2, ("embed", "sample", "neighbors"), _heads_settings, "epochs"),
    Stage("consensus", "icce_ray.consensus.job", 3, ("heads",), _consensus_settings, "steps"),
    Stage(
        "classifier", "icce_ray.classifier.job", 2, ("embed", "sample", "consensus"), _classifier_settings, "iterations"
    ),
    Stage(
        "assign",
        "icce_ray.assign.job",
        2,
        ("images", "embed", "sample", "consensus", "classifier"),
        _assign_settings,
    ),
    # The only stage that is told where the true labels are; nothing that makes clusters comes after it.
    Stage(
        "evaluate",
        "icce_ray.evaluate.run_scores",
        1,
        ("images", "embed", "sample", "heads", "consensus", "assign"),
        _evaluate_settings,
        sees_labels=True,
    ),
    Stage(
        "report",
        "icce_ray.report.page",
        3,
        ("images", "embed", "neighbors", "heads", "consensus", "classifier", "assign", "evaluate"),
        _report_settings,
        "clusters",
    ),
)

CLUSTER_COUNT = Stage(
    "cluster_count",
    "icce_ray.count.job",
    1,
    ("embed", "sample"),
    _cluster_count_settings,
    "clusterings",
)
COUNTING: tuple[Stage, ...] = (*STAGES[:3], CLUSTER_COUNT)
"""The stages of a run with `num_clusters: auto` until the number is chosen."""
COUNTED: tuple[Stage, ...] = (
    *STAGES[3:-1],
    replace(STAGES[-1], inputs=(*STAGES[-1].inputs, CLUSTER_COUNT.name)),
)
"""Its other stages: those of a run that was given the number, but for the report, which shows how it was chosen."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage of one run: the fingerprint of its result, where that lies, and the result where it is finished."""

    stage: Stage
    fingerprint: str
    input_fingerprints: dict[str, str]
    folder: Folder
    artifact: Artifact | None

    @property
    def name(self) -> str:
        return self.stage.name


def plan(
    config: Config, stages: tuple[Stage, ...] | None = None, given: Mapping[str, Artifact] | None = None
) -> list[PlannedStage]:
    """The stages of `config` in order, with what of them is finished. Reads manifests only.

    Args:
        stages: those of a run where None. Where its number of clusters is still to be chosen, those until then.
        given: finished artifacts that the stages build on, by the names they know them by.

    Raises:
        InputError: the input does not exist or cannot be listed, or the output cannot be read.
    """
    use_s3(config.storage)
    _check_storage(config)
    identities = {name: artifact.identity for name, artifact in (given or {}).items()}
    if stages is not None or not config.is_auto:
        return _plan(config, STAGES if stages is None else stages, identities)
    planned = _plan(config, COUNTING, identities)
    counted = planned[-1].artifact
    return planned if counted is None else [*planned, *_plan(_resolved(config, counted), COUNTED, identities)]


def _plan(config: Config, stages: tuple[Stage, ...], identities: dict[str, str]) -> list[PlannedStage]:
    """`identities` of what the stages build on are by name; theirs are added."""
    root = Folder.at(config.output)
    planned = []
    for stage in stages:
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
    return planned


def is_counted(planned: list[PlannedStage]) -> bool:
    """Whether all stages are planned: the number of clusters was given, or chosen by an earlier run."""
    return planned[-1].name != CLUSTER_COUNT.name


def _resolved(config: Config, counted: Artifact) -> Config:
    """`config` with the number of clusters that was chosen."""
    return config.with_num_clusters(counted.metrics["num_clusters"])


def run_name(planned: list[PlannedStage]) -> str:
    """A short hash of what all stages of a run are."""
    return fingerprint("run", 1, {}, {step.name: step.fingerprint for step in planned})[:10]


def run_pipeline(config: Config, *, quiet: bool = False) -> Result:
    """Cluster the images of `config`. What an earlier or killed run has finished is used, not redone.

    Args:
        config: every setting.
        quiet: no progress and no summary on standard error.

    Raises:
        UserError: something in the config, the input or the machine cannot work; raised before the long work where
            that can be known.
        WorkerError: a distributed stage failed for good; what is finished stays.
    """
    started = time.monotonic()
    planned = plan(config)
    if config.embed.retry_errors and retry_errors(config, planned, quiet):
        planned = plan(config)
    artifacts = _finished(planned)
    finished_before = tuple(artifacts)
    later = [] if is_counted(planned) else [stage.name for stage in COUNTED]
    _check(config, [*(step.name for step in planned if step.name not in artifacts), *later])
    counting_s: dict[str, float] = {}
    if not is_counted(planned):
        counting_s = _count(config, planned, artifacts, quiet)
        rest = plan(_resolved(config, artifacts[CLUSTER_COUNT.name]), COUNTED, artifacts)
        planned += rest
        artifacts |= _finished(rest)
        finished_before += tuple(_finished(rest))
    resolved = _resolved(config, artifacts[CLUSTER_COUNT.name]) if config.is_auto else config
    name = run_name(planned)
    fingerprints = {step.name: step.fingerprint for step in planned}
    write_record(config, name, fingerprints)
    with RunProgress(config.output, name) as told:
        seconds = finish(resolved, planned, artifacts, quiet, told)
    seconds |= {stage: seconds[stage] + spent for stage, spent in counting_s.items()}
    result = sum_up(resolved, name, artifacts, seconds, finished_before)
    if len(finished_before) < len(planned):
        write_record(config, name, fingerprints, result)
    if not quiet:
        print(summary(result, artifacts, time.monotonic() - started), file=sys.stderr, flush=True)
    return result


def _count(
    config: Config, planned: list[PlannedStage], artifacts: dict[str, Artifact], quiet: bool
) -> dict[str, float]:
    """Run the stages that choose the number of clusters. Until they have, these alone are the run, by a name of its
    own, so that others can ask how far it is."""
    name = run_name(planned)
    write_record(config, name, {step.name: step.fingerprint for step in planned})
    with RunProgress(config.output, name) as told:
        seconds = finish(config, planned, artifacts, quiet, told)
    remove_record(config, name)
    return seconds


def _finished(planned: list[PlannedStage]) -> dict[str, Artifact]:
    return {step.name: step.artifact for step in planned if step.artifact is not None}


def finish(
    config: Config,
    planned: list[PlannedStage],
    artifacts: dict[str, Artifact],
    quiet: bool,
    told: RunProgress | None = None,
) -> dict[str, float]:
    """Run the planned stages that `artifacts` lacks, in order, and put them there; one that turns out to be damaged is
    made again. Artifacts that are not planned are given, and never touched. `told` learns how far each stage is.
    Returns the seconds spent on each."""
    seconds = dict.fromkeys((step.name for step in planned), 0.0)
    redone: set[str] = set()
    while step := next((step for step in planned if step.name not in artifacts), None):
        began = time.monotonic()
        try:
            _check_listed(config, artifacts)
            artifacts[step.name] = run_stage(config, step, artifacts, quiet, told)
        except Exception as error:
            damage = _damage_of_inputs(error, step, {name: artifacts[name] for name in seconds if name in artifacts})
            if not damage or redone & set(damage):
                raise
            for damaged, parts in damage.items():
                if not quiet:
                    print(
                        f"{damaged}: damaged on storage ({', '.join(parts)}), made again", file=sys.stderr, flush=True
                    )
                del artifacts[damaged]
            redone |= set(damage)
        finally:
            seconds[step.name] = round(seconds[step.name] + time.monotonic() - began, 3)
    return seconds


def run_stage(
    config: Config,
    step: PlannedStage,
    artifacts: Mapping[str, Artifact],
    quiet: bool,
    told: RunProgress | None = None,
) -> Artifact:
    """Make the artifact of one stage of a plan; `artifacts` holds its inputs."""
    Artifact.discard_damage(step.folder)
    writer = ArtifactWriter(step.folder)
    progress = Progress(step.name, step.stage.unit, quiet)
    inputs = {name: artifacts[name] for name in step.stage.inputs}
    config = step.stage.config_of(config)
    with Claim(step.folder):
        finished = Artifact.find(step.folder)  # by another job, since this one was planned
        if finished is not None:
            return finished
        if told is not None:
            told.watch(progress)
        began = time.monotonic()
        metrics = importlib.import_module(step.stage.module).run(config, StageContext(writer, inputs, progress))
        seconds = time.monotonic() - began
        artifact = writer.commit(
            stage=step.name,
            fingerprint=step.fingerprint,
            inputs=step.input_fingerprints,
            config=config.model_dump(mode="json"),
            metrics=metrics,
            seconds=seconds,
            exclusive=True,
        )
    progress.note(f"done in {seconds:.1f} s")
    return artifact


def retry_errors(config: Config, planned: list[PlannedStage], quiet: bool) -> bool:
    """Try the images of the finished ``embed`` artifact's errors table again. Returns whether it changed."""
    step = next(step for step in planned if step.name == "embed")
    inputs = {other.name: other.artifact for other in planned if other.name in step.stage.inputs}
    images, artifact = inputs["images"], step.artifact
    if artifact is None or images is None or not num_failed({"embed": artifact}):
        return False
    writer, progress = ArtifactWriter(step.folder), Progress("retry", step.stage.unit, quiet)
    _check(config, ["embed"])
    with Claim(step.folder):
        began = time.monotonic()
        module = importlib.import_module(step.stage.module)
        metrics = module.retry(config, StageContext(writer, {"images": images}, progress), artifact)
        seconds = time.monotonic() - began
        if metrics is None:
            progress.note("the images of the errors table failed again")
            return False
        amended = writer.commit(
            stage=step.name,
            fingerprint=step.fingerprint,
            inputs=step.input_fingerprints,
            config=step.stage.config_of(config).model_dump(mode="json"),
            metrics=metrics,
            seconds=seconds,
            revision=artifact.manifest.revision + 1,
        )
        for name in set(artifact.part_names()) - set(amended.part_names()):
            step.folder.remove(name)
    progress.note(f"{num_failed({'embed': artifact}) - num_failed({'embed': amended})} images more can be used")
    return True


def _damage_of_inputs(error: Exception, step: PlannedStage, artifacts: Mapping[str, Artifact]) -> dict[str, list[str]]:
    """The inputs of `step` that are damaged, if that is why it failed. They are unfinished from here on."""
    if find_cause(error, DamagedArtifactError) is None:
        return {}
    inputs = [name for name in step.stage.inputs if name in artifacts]
    damage = {name: Artifact.discard_damage(artifacts[name].folder) for name in inputs}
    return {name: parts for name, parts in damage.items() if parts}


def _check(config: Config, pending: list[str]) -> None:
    """Refuse what can be known to fail before the work starts."""
    if "embed" in pending and config.embeddings.uri is None:
        from icce_ray.embed.backbone import check_backbone

        check_backbone(config)
    if "evaluate" in pending and config.evaluate.labels is not None:
        from icce_ray.evaluate.labels import check_labels

        check_labels(config)
    if "consensus" in pending and config.consensus.extra_runs:
        from icce_ray.consensus.extra_runs import find_heads

        find_heads(config)
    if pending:
        from icce_ray.runtime.ray_cluster import check_resources

        check_resources(config, pending)


def _check_storage(config: Config) -> None:
    """Say within seconds that a bucket is not there, or refuses us."""
    places = [("output", config.output), *(("images.uri", uri) for uri in config.images.uris)]
    seen = set()
    for setting, uri in places:
        if is_s3(uri) and (bucket := split_uri(uri)[0]) not in seen:
            seen.add(bucket)
            check_bucket(uri, config.storage, setting)


def _check_listed(config: Config, artifacts: Mapping[str, Artifact]) -> None:
    """Refuse what can be known to fail once the images are listed, and again once they are embedded."""
    if "images" not in artifacts:
        return
    usable, which = num_listed(artifacts), "images"
    if "embed" in artifacts:
        usable, which = usable - num_failed(artifacts), "usable images"
    needed, setting = config.needed_images
    if needed > usable:
        raise InputError(f"{setting}: {needed} clusters asked for, but there are only {usable:,} {which}")
    if "embed" not in artifacts and config.evaluate.labels is not None:
        from icce_ray.evaluate.labels import check_labels
        from icce_ray.images.listing import Listing

        listing = Listing(artifacts["images"])
        check_labels(config, listing.table(0, len(listing)))


def _file_identity(uri: str) -> Settings:
    filesystem, path = open_uri(uri)
    info = filesystem.get_file_info(path)
    return {"num_bytes": info.size, "modified_ns": info.mtime_ns}
