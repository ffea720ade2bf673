"""Run a plan: skip what is finished, run the rest in order, sum up."""

import importlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from icce_ray.config import Config
from icce_ray.consensus.stage import CONSENSUS
from icce_ray.corrections.stage import with_kept_corrections
from icce_ray.embed.part_hashes import names_beside
from icce_ray.embed.stage import EMBED, num_failed
from icce_ray.errors import BusyError, DamagedArtifactError, WorkerError, find_cause
from icce_ray.images.stage import IMAGES, settings_for
from icce_ray.pipeline.latest import publish
from icce_ray.pipeline.numbers_kept import remember
from icce_ray.pipeline.plan import (
    SHARED_BY_METHODS,
    PlannedStage,
    check_counts,
    check_stages,
    clustering_stages,
    combine_methods,
    connect_storage,
    fingerprints_of,
    finished_artifacts,
    is_complete,
    of_first_method,
    plan,
    plan_other_methods,
    run_name,
    stages_of,
    with_chosen_number,
)
from icce_ray.pipeline.result import Result, sum_up, summary
from icce_ray.pipeline.status import RunProgress
from icce_ray.runtime.progress import Progress, outages_told
from icce_ray.runtime.ray_cluster import lost_ray
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Claim, Folder, fingerprint
from icce_ray.store.run_records import remove_record, write_record, write_unfinished

RunStage = Callable[[Config, StageContext], dict[str, Any]]


def run_pipeline(config: Config, *, refresh: bool = False, retry_errors: bool = False, quiet: bool = False) -> Result:
    """Cluster the images of `config`. Whatever an earlier or killed run has finished is used again. With `refresh`, new
    images are looked for first; with `retry_errors`, those of the errors table are tried again first.

    Raises UserError: something in the config, the input or the machine cannot work (before the long work where that can
    be known); WorkerError: a distributed stage failed for good. Finished work is kept."""
    started = time.monotonic()
    if refresh:
        refresh_listing(config, quiet)
    _list_images(config, quiet)
    planned = plan(config)
    asked, config = config, with_kept_corrections(config)
    if retry_errors and retry_failed_images(config, planned, quiet):
        planned = plan(config, lists=False)
    unplanned = () if is_complete(planned) else stages_of(config)[len(planned) :]
    artifacts = finished_artifacts(planned)
    finished_before = tuple(artifacts)
    first = of_first_method(config)
    check_stages(first, [*(step.stage for step in planned if step.name not in artifacts), *unplanned])
    for method in config.methods[1:]:
        check_stages(config.of_method(method), clustering_stages(config.of_method(method))[-1:])
    spent: Counter[str] = Counter()
    if unplanned:
        # Until the number of clusters is chosen, a run of its own, so that `status` can show how far that is.
        spent.update(_run_recorded(first, planned, artifacts, quiet))
        remove_record(config.output, run_name(planned))
        rest = plan(with_chosen_number(config, planned, artifacts), unplanned, planned)
        planned += rest
        artifacts |= finished_artifacts(rest)
        finished_before += tuple(finished_artifacts(rest))
    resolved = with_chosen_number(config, planned, artifacts)
    for other, steps in plan_other_methods(resolved, planned):
        spent.update(_make_clusterings(other, steps, artifacts, quiet))
    by_name = {step.name: step for step in planned}
    resolved = combine_methods(resolved, planned)
    # As planned: another run may have become the newest since.
    numbers = {"numbers_from": by_name[CONSENSUS.name].numbers_from}
    resolved = resolved.model_copy(update={"consensus": resolved.consensus.model_copy(update=numbers)})
    name, record = run_name(planned), asked.to_record()
    seconds = _run_recorded(resolved, planned, artifacts, quiet, record)
    seconds = {stage: round(of_stage + spent[stage], 3) for stage, of_stage in seconds.items()}
    result = sum_up(resolved, name, artifacts, seconds, finished_before)
    is_new = len(finished_before) < len(planned)
    if is_new:
        write_record(config.output, name, fingerprints_of(planned), record, result.to_json())
    remember(asked, name, by_name[IMAGES.name].identity, resolved.consensus.numbers_from)
    try:
        places = publish(config.output, name, artifacts, result.to_json(), is_new=is_new)
    except (OSError, BusyError) as error:
        places = {}
        print(f"latest: could not be written, the run itself is finished: {error}", file=sys.stderr, flush=True)
    if not quiet:
        print(summary(result, artifacts, places, time.monotonic() - started), file=sys.stderr, flush=True)
    return result


def _list_images(config: Config, quiet: bool) -> None:
    """List the images. Until the first listing is there, the run has another name, by which `status` can show how far
    that is."""
    from icce_ray.images.list_images import last_digest, list_now

    if IMAGES not in stages_of(config) or config.embeddings.uri is not None:
        return
    connect_storage(config)
    progress = Progress(IMAGES.name, "files", quiet)
    with outages_told(config.images.uris, config.storage, progress):
        if last_digest(config) is not None:
            list_now(config, progress)
            return
        planned = plan(config, lists=False)
        name = run_name(planned)
        with RunProgress(config.output, name) as told:
            write_record(config.output, name, fingerprints_of(planned), config.model_dump(mode="json"))
            told.watch(progress)
            list_now(config, progress)
        remove_record(config.output, name)


def _make_clusterings(
    config: Config, planned: list[PlannedStage], artifacts: dict[str, Artifact], quiet: bool
) -> dict[str, float]:
    """Run one of several methods up to its clusterings, and record it, so that a consensus finds it by its name. Adds
    what it shares with the others to `artifacts`."""
    made = finished_artifacts(planned) | {name: artifacts[name] for name in SHARED_BY_METHODS if name in artifacts}
    seconds = _run_recorded(config, planned, made, quiet)
    artifacts |= {name: made[name] for name in SHARED_BY_METHODS}
    return seconds


def _run_recorded(
    config: Config,
    planned: list[PlannedStage],
    artifacts: dict[str, Artifact],
    quiet: bool,
    record: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Record the planned stages as a run, and run them."""
    name = run_name(planned)
    write_record(config.output, name, fingerprints_of(planned), record or config.model_dump(mode="json"))
    with RunProgress(config.output, name) as told:
        return run_stages(config, planned, artifacts, quiet, told)


def run_stages(
    config: Config,
    planned: list[PlannedStage],
    artifacts: dict[str, Artifact],
    quiet: bool,
    told: RunProgress | None = None,
) -> dict[str, float]:
    """Run the planned stages that `artifacts` (by stage name) lacks, in order, and add their artifacts to it. `told` is
    kept informed of how far each stage is; None if this is no recorded run.

    An artifact that turns out to be damaged is made again, if it is among the planned ones; the others were given and
    are never touched. Returns the seconds spent on each stage."""
    if told is None and any(step.name not in artifacts for step in planned):
        write_unfinished(config.output, run_name(planned), fingerprints_of(planned))
    seconds = dict.fromkeys((step.name for step in planned), 0.0)
    redone: set[str] = set()
    while step := next((step for step in planned if step.name not in artifacts), None):
        began = time.monotonic()
        try:
            check_counts(config, artifacts)
            artifacts[step.name] = run_stage(config, step, artifacts, quiet, told)
        except (Exception, KeyboardInterrupt) as error:
            if (lost := lost_ray()) is not None:
                raise WorkerError(f"{step.name}: {lost}") from None
            damage = _damage_of_inputs(error, step, {name: artifacts[name] for name in seconds if name in artifacts})
            if not damage or redone & set(damage):
                raise
            for damaged, parts in damage.items():
                Progress(damaged, quiet=quiet).note(f"damaged on storage ({', '.join(parts)}), made again")
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
    run: RunStage | None = None,
) -> Artifact:
    """Make the artifact of one stage of a plan; `artifacts` holds its inputs. `run` replaces the stage's own."""
    Artifact.discard_damage(step.folder)
    inputs = {name: artifacts[name] for name in step.stage.inputs}
    config = step.stage.config_of(config)
    shortcut = step.stage.shortcut(config) if step.stage.shortcut is not None else ""
    progress = Progress(step.name, step.stage.unit, quiet, shortcut=shortcut)
    with Claim(step.folder) as claim:
        finished = Artifact.find(step.folder)  # by another job, since this one was planned
        if finished is not None:
            return finished
        if told is not None:
            told.watch(progress)
        began, writer = time.monotonic(), ArtifactWriter(claim.folder)
        run = run or importlib.import_module(step.stage.module).run
        with outages_told([config.output, *config.images.uris], config.storage, progress):
            metrics = run(config, StageContext(writer, inputs, progress))
        seconds = time.monotonic() - began
        claim.confirm()
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


def refresh_listing(config: Config, quiet: bool) -> None:
    """List the images again if they have changed: known images keep their ids, new ones get the next. Runs that follow
    use the new listing."""
    from icce_ray.images.list_images import find_changes

    connect_storage(config)
    progress = Progress(IMAGES.name, "files", quiet)
    with outages_told(config.images.uris, config.storage, progress):
        changes = None if config.embeddings.uri is not None else find_changes(config, progress)
    if changes is not None:
        own = fingerprint(IMAGES.name, IMAGES.version, settings_for(config, changes.digest), {})
        step = PlannedStage(IMAGES, own, {}, Folder.at(config.output) / IMAGES.name / own, None)
        run_stage(config, step, {}, quiet, run=changes.run)


def retry_failed_images(config: Config, planned: list[PlannedStage], quiet: bool) -> bool:
    """Try the images of the finished ``embed`` artifact's errors table again. Returns whether it changed."""
    step = next(step for step in planned if step.name == EMBED.name)
    inputs = {other.name: other.artifact for other in planned if other.name in step.stage.inputs}
    images, artifact = inputs["images"], step.artifact
    if artifact is None or images is None or not num_failed(artifact) or config.embeddings.uri is not None:
        return False  # files of embeddings that were mended are another input
    progress = Progress("retry", step.stage.unit, quiet)
    check_stages(config, [step.stage])
    with Claim(step.folder) as claim:
        writer = ArtifactWriter(claim.folder)
        module = importlib.import_module(step.stage.module)
        metrics = module.retry(config, StageContext(writer, {"images": images}, progress), artifact)
        if metrics is None:
            progress.note("the images of the errors table failed again")
            return False
        claim.confirm()
        amended = writer.amend(artifact, metrics, revision=artifact.manifest.revision + 1)
        for name in set(artifact.file_names()) - set(amended.file_names()):
            for beside in names_beside(name):
                step.folder.remove(beside)
    progress.note(f"{num_failed(artifact) - num_failed(amended)} images more can be used")
    return True


def _damage_of_inputs(
    error: BaseException, step: PlannedStage, artifacts: Mapping[str, Artifact]
) -> dict[str, list[str]]:
    """The inputs of `step` that are damaged, if that is why it failed. They are unfinished from here on."""
    if find_cause(error, DamagedArtifactError) is None:
        return {}
    inputs = [name for name in step.stage.inputs if name in artifacts]
    damage = {name: Artifact.discard_damage(artifacts[name].folder) for name in inputs}
    return {name: parts for name, parts in damage.items() if parts}
