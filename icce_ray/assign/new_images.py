"""Label new images with the model of a finished run: ``icce-ray assign RUN --images URI`` or ``--embeddings URI``.

New images go through the run's stages ``images`` and ``embed``; ready-made embeddings are read in place. Finished
stages and parts are used again, so the same command resumes after a kill.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icce_ray.assign.drift import drift_lines
from icce_ray.assign.load_model import check_weights, embed_config, find_model
from icce_ray.assign.new_clusters import NEW_CLUSTERS_NAME
from icce_ray.assign.stage import ASSIGN
from icce_ray.classifier.linear import DESCRIPTION_NAME
from icce_ray.classifier.stage import CLASSIFIER
from icce_ray.config import Config, load_config
from icce_ray.embed.stage import EMBED, num_failed
from icce_ray.errors import InputError
from icce_ray.images.embedding_files import open_embeddings
from icce_ray.images.list_images import source_digest
from icce_ray.images.stage import IMAGES
from icce_ray.pipeline.find_run import find_stage
from icce_ray.pipeline.latest import add_new_images
from icce_ray.pipeline.plan import PlannedStage, check_stages, plan
from icce_ray.pipeline.run import run_stages
from icce_ray.runtime.progress import format_seconds
from icce_ray.stage import Settings, Stage
from icce_ray.store import Artifact

VERSION = 3
"""Raised when the treatment of new images changes and that of a run's own images does not."""
NEW_CLUSTERS_SHOWN = 5
FREE_EMBED_SETTINGS = {"batch_size", "max_error_rate", "max_image_pixels"}
"""Settings of `embed` that don't change the features. All others are the model's."""


def _assign_settings(config: Config) -> Settings:
    # The model already holds the outlier threshold.
    settings: Settings = {"assign": config.assign.model_dump(exclude={"outlier_quantile"}), "seed": config.seed}
    settings["new_clusters"] = VERSION
    if config.embeddings.uri is None:
        return settings
    given = {"embeddings": config.embeddings.model_dump(), "uri_column": config.images.uri_column}
    return settings | given | {"source": source_digest(config)}


IMAGE_STAGES: tuple[Stage, ...] = (
    IMAGES,
    EMBED,
    replace(ASSIGN, inputs=("images", "embed", "classifier"), settings=_assign_settings),
)
EMBEDDING_STAGES: tuple[Stage, ...] = (replace(ASSIGN, inputs=("classifier",), settings=_assign_settings),)


@dataclass(frozen=True)
class AssignResult:
    """The outcome for new images, and where the files are."""

    num_images: int
    """Images labelled."""
    num_errors: int
    """Images that could not be used; the table `errors` says why."""
    num_outliers: int
    num_clusters_used: int
    mean_consensus_probability: float
    assignments: str
    """Folder of Parquet parts with a row per image."""
    exemplars: str
    """A Parquet table: cluster, rank, image_id, uri, agreement, consensus_probability."""
    drift_file: str
    new_clusters: str
    """A Parquet table: new_cluster, image_id, uri, cluster (the assigned one)."""
    new_cluster_sizes: list[int]
    """Images of each new cluster that is offered."""
    errors: str
    """A Parquet table: image_id, uri, reason."""
    all_images: str | None
    """Folder of the assignments of the run's images and of all new ones; None if the output has another newest run."""
    drift: dict[str, Any]
    """How the images differ from the training images, see drift.py."""
    seconds: dict[str, float]
    """By stage, for this call: 0 if it was finished before."""


def assign_images(
    run: str | Path,
    *,
    images: str | Path | None = None,
    embeddings: str | Path | None = None,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> AssignResult:
    """Label new images with the model of a finished run.

    Args:
        run: the run's config (.yaml), its output folder (if that holds a single model), its record
            (``<output>/runs/<run>.json``), or its model folder or a copy of that.
        images: as `images.uri`.
        embeddings: as `embeddings.uri`; exactly one of the two is given.
        output: folder or URI for the results. None: the run's own output.
        overrides: further settings, such as ``resources.assign.num_workers=4``.
        quiet: no progress and no summary on standard error.

    Raises:
        UserError: an argument or setting cannot work; raised before the long work if possible.
        WorkerError: the workers failed for good; finished parts stay.
    """
    started = time.monotonic()
    if (images is None) == (embeddings is None):
        raise InputError("assign: give either images or embeddings")
    model, settings = _find_run(str(run))
    place = str(output) if output is not None else settings.get("output")
    if place is None:
        raise InputError(f"{run} is a model folder without a run: give output (--output), the place for the results")
    for section, uri in (("images", images), ("embeddings", embeddings)):
        settings[section] = settings.get(section, {}) | {"uri": None if uri is None else str(uri)}
    settings["embeddings"].pop("extra", None)  # the model takes the first feature set
    config = _config_for(model, settings | {"output": place}, list(overrides))
    trained = PlannedStage(CLASSIFIER, model.fingerprint, {}, model.folder, model)
    planned = plan(config, IMAGE_STAGES if images is not None else EMBEDDING_STAGES, [trained])
    artifacts = {"classifier": model} | {step.name: step.artifact for step in planned if step.artifact is not None}
    check_stages(config, [step.stage for step in planned if step.artifact is None])
    seconds = run_stages(config, planned, artifacts, quiet)
    result = _sum_up(artifacts, seconds, add_new_images(place, artifacts["assign"]))
    if not quiet:
        print(_summary(result, time.monotonic() - started), file=sys.stderr, flush=True)
    return result


def _find_run(run: str) -> tuple[Artifact, Settings]:
    """The classifier artifact of a finished run, and the run's settings, or those known of a model folder."""
    found = find_stage(run, "classifier", several="models")
    if found is not None:
        return found
    artifact = find_model(run)
    # Without `resources`: this is another machine than the one that trained it.
    return artifact, {key: artifact.manifest.config[key] for key in ("images", "embeddings", "assign")}


def _config_for(model: Artifact, settings: Settings, overrides: list[str]) -> Config:
    """The config of the stages: `embed` as in the run, everything else as given."""
    description = model.read_json(DESCRIPTION_NAME)
    kept = ("images", "embeddings", "output", "assign", "resources")
    base = {key: settings[key] for key in kept if key in settings}
    base |= {"num_clusters": description["num_clusters"], "seed": description["seed"]}
    config = load_config(None, overrides, base=base, source="assign")
    fixed = sorted(config.embed.model_fields_set - FREE_EMBED_SETTINGS)
    if fixed:
        raise InputError(
            f"embed.{fixed[0]}: given by the model; only {', '.join(sorted(FREE_EMBED_SETTINGS))} can be set"
        )
    if config.embeddings.uri is not None:
        dim = open_embeddings(config.embeddings).dim
        if dim != description["num_dims"]:
            raise InputError(
                f"embeddings.uri: {config.embeddings.uri} has {dim} dimensions; the model takes "
                f"{description['num_dims']}: use the backbone and features it was trained on"
            )
    else:
        given = config.embed.model_dump(include=config.embed.model_fields_set)
        embed = embed_config(model, description).model_copy(update=given)
        check_weights(embed, description)
        config = config.model_copy(update={"embed": embed})
    # A run needs at least as many images as clusters. Here a single image is enough, so K is set to 1 for that check.
    return config.with_num_clusters(1)


def _sum_up(artifacts: dict[str, Artifact], seconds: dict[str, float], all_images: str | None) -> AssignResult:
    made = artifacts["assign"]
    embed = artifacts.get("embed", made)  # which has the errors of ready-made embeddings
    return AssignResult(
        num_images=made.metrics["num_images"],
        num_errors=num_failed(embed),
        num_outliers=made.metrics["num_outliers"],
        num_clusters_used=made.metrics["num_clusters_used"],
        mean_consensus_probability=made.metrics["mean_consensus_probability"],
        assignments=made.folder.file_uri("assignments"),
        exemplars=made.folder.file_uri("exemplars.parquet"),
        drift_file=made.folder.file_uri("drift.json"),
        new_clusters=made.folder.file_uri(NEW_CLUSTERS_NAME),
        new_cluster_sizes=made.metrics["new_cluster_sizes"],
        errors=embed.folder.file_uri("errors.parquet"),
        all_images=all_images,
        drift=made.read_json("drift.json"),
        seconds=seconds,
    )


def _summary(result: AssignResult, total_s: float) -> str:
    """The last lines of the output."""
    lines = [
        "",
        f"{result.num_images:,} images labelled, {result.num_errors:,} errors, {result.num_clusters_used:,} clusters "
        f"used, {result.num_outliers:,} outliers; {format_seconds(total_s)}",
        "compared with the training images:",
        *(f"  {line}" for line in drift_lines(result.drift)),
        f"assignments  {result.assignments}",
        f"exemplars    {result.exemplars}",
        f"drift        {result.drift_file}",
    ]
    if sizes := result.new_cluster_sizes:
        images = ", ".join(f"{size:,}" for size in sizes[:NEW_CLUSTERS_SHOWN])
        lines.append(f"new clusters {len(sizes):,} among the outliers, the largest of {images} images")
        lines.append(f"             {result.new_clusters}")
    if result.all_images:
        lines.append(f"all images   {result.all_images}")
    if result.num_errors:
        lines.append(f"errors       {result.errors}")
    return "\n".join(lines)
