"""Plan a run: which stages it has, the fingerprint of each stage's result, where it lies, and whether it is finished.

Planning starts nothing and imports neither Ray nor torch, so a run that finds everything finished needs neither.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from icce_ray.assign.stage import ASSIGN
from icce_ray.classifier.stage import CLASSIFIER
from icce_ray.config import Config
from icce_ray.consensus.stage import CONSENSUS, NONE
from icce_ray.corrections.stage import CORRECTIONS, has_corrections, with_kept_corrections
from icce_ray.count.stage import CLUSTER_COUNT
from icce_ray.embed.stage import EMBED, num_failed
from icce_ray.errors import InputError
from icce_ray.evaluate.stage import EVALUATE
from icce_ray.images.stage import AS_LISTED, IMAGES, num_listed
from icce_ray.methods import METHODS
from icce_ray.methods.stage import method_stage
from icce_ray.neighbors.stage import NEIGHBORS
from icce_ray.pipeline.numbers_kept import with_numbers_from
from icce_ray.report.stage import REPORT
from icce_ray.sample.stage import SAMPLE
from icce_ray.stage import Stage
from icce_ray.store import Artifact, Folder, fingerprint
from icce_ray.store.filesystem import check_store, store_of
from icce_ray.store.s3 import use_s3

MAX_CHECKED = 2_000_000
"""With more images, labels are compared with the images only when these are scored."""


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of a run with this config, in order.

    With ``num_clusters: auto``, the method finds the number if it can; else `cluster_count` chooses it, and the stages
    after that are those of a run that was given the number, except for the report, which shows how it was chosen.

    With several methods, these are the stages of the first; the others are runs up to `method`, whose clusterings the
    consensus takes in.
    """
    method = config.methods[0]
    stages = [
        IMAGES,
        EMBED,
        SAMPLE,
        *([CLUSTER_COUNT] if config.is_auto and not config.finds_num_clusters else []),
        *([NEIGHBORS] if METHODS[method].needs_graph else []),
        method_stage(method, chooses_number=config.is_auto and config.finds_num_clusters),
        CONSENSUS,
        *([CORRECTIONS] if has_corrections(config) else []),
        CLASSIFIER,
        ASSIGN,
        EVALUATE,
        REPORT,
    ]
    names = {stage.name for stage in stages}
    # Without the inputs that this run does not have.
    return tuple(replace(stage, inputs=tuple(name for name in stage.inputs if name in names)) for stage in stages)


def clustering_stages(config: Config) -> tuple[Stage, ...]:
    """The stages up to `method`, with a number of clusters that is known."""
    stages = stages_of(config)
    return stages[: [stage.name for stage in stages].index("method") + 1]


SHARED_BY_METHODS = ("images", "embed", "sample")
"""Stages that the methods of a run have in common."""


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
    numbers_from: str = NONE
    """The run whose numbers the consensus keeps."""

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def identity(self) -> str:
        """Its part in the fingerprints of later stages."""
        return self.fingerprint if self.artifact is None else self.artifact.identity


def plan(
    config: Config, stages: tuple[Stage, ...] | None = None, before: Sequence[PlannedStage] = (), *, lists: bool = True
) -> list[PlannedStage]:
    """Plan the stages of a run in order: all, or `stages` that build on those planned `before`. Only manifests are
    read, and the images are listed; without `lists`, the last listing holds, whatever has happened to them since.

    With ``num_clusters: auto`` the plan ends with the stage that chooses the number until that is finished. Raises
    InputError: the input does not exist or cannot be listed, or the output cannot be read."""
    connect_storage(config)
    config = with_kept_corrections(config)
    stages = stages_of(config) if stages is None else stages
    if not lists:
        stages = tuple(AS_LISTED if stage.name == IMAGES.name else stage for stage in stages)
    return _plan(config, stages, before)


def _plan(config: Config, stages: tuple[Stage, ...], before: Sequence[PlannedStage]) -> list[PlannedStage]:
    asked, config = config, of_first_method(config)
    planned = list(before)
    identities = {step.name: step.identity for step in before}
    root = Folder.at(config.output)
    for stage in stages:
        if stage.name == CONSENSUS.name:
            config = with_numbers_from(combine_methods(asked, planned), asked, identities.get("images", ""))
        inputs = {name: identities[name] for name in stage.inputs}
        settings = stage.settings(stage.config_of(config))
        own = fingerprint(stage.name, stage.version, settings, inputs)
        folder = root / stage.name / own
        try:
            artifact = Artifact.find(folder)
        except OSError as error:
            raise InputError(f"output: {config.output!r} cannot be read: {error}") from None
        planned.append(PlannedStage(stage, own, inputs, folder, artifact, config.consensus.numbers_from))
        identities[stage.name] = planned[-1].identity
        if stage.chooses_number:
            if artifact is None:
                break
            found = artifact.metrics["num_clusters"]
            asked, config = asked.with_num_clusters(found), config.with_num_clusters(found)
    return planned[len(before) :]


def plan_other_methods(config: Config, planned: list[PlannedStage]) -> list[tuple[Config, list[PlannedStage]]]:
    """The runs of all methods but the first, up to `method`: their configs and plans. They share the stages before the
    neighbours with `planned`, those of the run itself. The number of clusters is known."""
    shared = [step for step in planned if step.name in SHARED_BY_METHODS]
    runs = []
    for method in config.methods[1:]:
        other = config.of_method(method)
        stages = tuple(stage for stage in clustering_stages(other) if stage.name not in SHARED_BY_METHODS)
        runs.append((other, shared + _plan(other, stages, shared)))
    return runs


def of_first_method(config: Config) -> Config:
    """A config of several methods with the first alone; the consensus is the config's own."""
    if len(config.methods) == 1:
        return config
    kept = {"consensus": config.consensus, "given_num_clusters": config.given_num_clusters}
    return config.of_method(config.methods[0]).model_copy(update=kept)


def combine_methods(config: Config, planned: list[PlannedStage]) -> Config:
    """A config of several methods as the run that combines them: the first method, and in its consensus the clusterings
    of the others as extra runs."""
    if len(config.methods) == 1:
        return config
    return of_first_method(config).with_extra_runs(run_name(steps) for _, steps in plan_other_methods(config, planned))


def is_complete(planned: list[PlannedStage]) -> bool:
    """Whether all stages of the run are planned, because the number of clusters is known."""
    return not planned[-1].stage.chooses_number


def with_chosen_number(config: Config, planned: Sequence[PlannedStage], artifacts: Mapping[str, Artifact]) -> Config:
    """`config` with the number of clusters that a finished stage of `planned` chose; as it is if none did."""
    for step in planned:
        if step.stage.chooses_number and step.name in artifacts:
            return config.with_num_clusters(artifacts[step.name].metrics["num_clusters"])
    return config


def finished_artifacts(planned: list[PlannedStage]) -> dict[str, Artifact]:
    return {step.name: step.artifact for step in planned if step.artifact is not None}


def fingerprints_of(planned: list[PlannedStage]) -> dict[str, str]:
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
        if (store := store_of(uri)) is not None and store not in seen:
            seen.add(store)
            check_store(uri, config.storage, setting)


def check_stages(config: Config, pending: Collection[Stage]) -> None:
    """Refuse what is known to fail before any work starts."""
    for stage in pending:
        if stage.check is not None:
            stage.check(stage.config_of(config))
    if pending:
        from icce_ray.runtime.cluster_resources import check_resources

        check_resources(config, [stage.name for stage in pending])


def check_counts(config: Config, artifacts: Mapping[str, Artifact]) -> None:
    """Refuse what is known to fail once the images are listed, and again once they are embedded."""
    needed, what = config.needed_images
    if "sample" in artifacts and needed > (trained := artifacts["sample"].metrics["num_images"]):
        raise InputError(
            f"{what} asked for, but only {trained:,} images are trained on; near-duplicates are left out, and images "
            "above sample.max_images"
        )
    if "images" not in artifacts:
        return
    usable, which, why = num_listed(artifacts["images"]), "images", ""
    if "embed" in artifacts and num_failed(artifacts["embed"]):
        usable, which = usable - num_failed(artifacts["embed"]), "usable images"
        reasons = artifacts["embed"].metrics.get("errors", {})
        why = ": " + ", ".join(f"{count:,} x {reason}" for reason, count in reasons.items())
    if needed > usable:
        raise InputError(f"{what} asked for, but there are only {usable:,} {which}{why}")
    if "embed" not in artifacts and config.evaluate.labels is not None:
        from icce_ray.evaluate.labels import check_labels
        from icce_ray.images.listing import Listing

        listing = Listing(artifacts["images"])
        is_large = len(listing) > MAX_CHECKED
        check_labels(config.evaluate, None if is_large else listing.table(0, len(listing))["uri"].to_pylist())
