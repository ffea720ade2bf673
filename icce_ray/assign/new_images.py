"""New images labelled by a finished run's model: ``icce-ray assign RUN --images URI`` or ``--embeddings URI``.

The stages ``images`` and ``embed`` of a run do for new images what they did for its own; ready-made embeddings are read
where they lie. What is finished is used, not redone: the same command goes on where a killed one was.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from icce_ray.assign.drift import drift_lines
from icce_ray.assign.load_model import check_weights, embed_config, find_model
from icce_ray.assign.stage import ASSIGN
from icce_ray.classifier.linear import DESCRIPTION_NAME
from icce_ray.config import Config, load_config
from icce_ray.embed.backbone_plan import check_backbones
from icce_ray.embed.stage import EMBED, num_failed
from icce_ray.errors import InputError
from icce_ray.images.embedding_files import open_embeddings
from icce_ray.images.list_images import source_digest
from icce_ray.images.stage import IMAGES
from icce_ray.pipeline.find_run import find_stage
from icce_ray.pipeline.plan import plan
from icce_ray.pipeline.run import run_stages
from icce_ray.runtime.progress import format_seconds
from icce_ray.stage import Settings, Stage
from icce_ray.store import Artifact

FREE_EMBED_SETTINGS = {"batch_size", "max_error_rate", "max_image_pixels"}
"""How fast, and what is bad enough to stop for; what the features are is the model's."""


def _assign_settings(config: Config) -> Settings:
    # The rule for outliers is the classifier's.
    settings: Settings = {"assign": config.assign.model_dump(exclude={"outlier_quantile"}), "seed": config.seed}
    if config.embeddings.uri is None:
        return settings
    given = {"embeddings": config.embeddings.model_dump(), "uri_column": config.images.uri_column}
    return settings | given | {"source": source_digest(config.images, config.embeddings, config.output)}


IMAGE_STAGES: tuple[Stage, ...] = (
    IMAGES,
    EMBED,
    replace(ASSIGN, inputs=("images", "embed", "classifier"), settings=_assign_settings),
)
EMBEDDING_STAGES: tuple[Stage, ...] = (replace(ASSIGN, inputs=("classifier",), settings=_assign_settings),)


@dataclass(frozen=True)
class AssignResult:
    """What was made of new images and where it lies."""

    num_images: int
    """Images labelled."""
    num_errors: int
    """Images that could not be used; the table `errors` says why."""
    num_outliers: int
    num_clusters_used: int
    mean_confidence: float
    assignments: str
    """Folder of Parquet parts with a row per image."""
    exemplars: str
    """A Parquet table: cluster, rank, image_id, uri, confidence."""
    drift_file: str
    errors: str | None
    """A Parquet table: image_id, uri, reason; None for ready-made embeddings."""
    drift: dict[str, Any]
    """How the images differ from those of the run, see drift.py."""
    seconds: dict[str, float]
    """By stage, in this run: 0 for what was finished before."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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
        run: the run's config (.yaml), its output folder (where that holds one model), its record
            (``<output>/runs/<run>.json``), or the folder of its model, or a copy of that.
        images: as `images.uri`.
        embeddings: as `embeddings.uri`; exactly one of the two is given.
        output: folder or URI for the results. None: the run's own output.
        overrides: further settings, such as ``resources.assign.num_workers=4``.
        quiet: no progress and no summary on standard error.

    Raises:
        UserError: something given cannot work; raised before the long work where that can be known.
        WorkerError: workers failed for good; what is finished stays.
    """
    started = time.monotonic()
    if (images is None) == (embeddings is None):
        raise InputError("assign: give either images or embeddings")
    model, settings = _find_run(str(run))
    place = str(output) if output is not None else settings.get("output")
    if place is None:
        raise InputError(f"{run} is a model by itself: say with output (--output) where the results are to go")
    for section, uri in (("images", images), ("embeddings", embeddings)):
        settings[section] = settings.get(section, {}) | {"uri": None if uri is None else str(uri)}
    config = _config_for(model, settings | {"output": place}, list(overrides))
    planned = plan(config, IMAGE_STAGES if images is not None else EMBEDDING_STAGES, {"classifier": model})
    artifacts = {"classifier": model} | {step.name: step.artifact for step in planned if step.artifact is not None}
    _check(config, [step.name for step in planned if step.artifact is None])
    seconds = run_stages(config, planned, artifacts, quiet)
    result = _sum_up(artifacts, seconds)
    if not quiet:
        print(_summary(result, time.monotonic() - started), file=sys.stderr, flush=True)
    return result


def _find_run(run: str) -> tuple[Artifact, Settings]:
    """The classifier artifact of a finished run, and the run's settings as far as they are known."""
    found = find_stage(run, "classifier", several="models")
    if found is not None:
        return found
    artifact = find_model(run)
    # What the machine that trained it had is no guide.
    return artifact, {key: artifact.manifest.config[key] for key in ("images", "embeddings", "assign")}


def _config_for(model: Artifact, settings: Settings, overrides: list[str]) -> Config:
    """The config of the stages: embeds as the run did, and everything else as given."""
    description = model.read_json(DESCRIPTION_NAME)
    kept = ("images", "embeddings", "output", "assign", "resources")
    base = {key: settings[key] for key in kept if key in settings}
    base |= {"num_clusters": description["num_clusters"], "seed": description["seed"]}
    config = load_config(None, overrides, base=base, source="assign")
    fixed = sorted(config.embed.model_fields_set - FREE_EMBED_SETTINGS)
    if fixed:
        raise InputError(
            f"embed.{fixed[0]}: the model's own holds; of `embed`, {', '.join(sorted(FREE_EMBED_SETTINGS))} may be set"
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
    # A run needs as many images as clusters; one new image is enough. So the bound is put below what a config allows.
    return config.with_num_clusters(1)


def _check(config: Config, pending: list[str]) -> None:
    """Refuse what can be known to fail before the work starts."""
    if "embed" in pending:
        check_backbones(config.embed)
    if pending:
        # Imports Ray, which a command that finds everything finished need not wait for.
        from icce_ray.runtime.cluster_resources import check_resources

        check_resources(config, pending)


def _sum_up(artifacts: dict[str, Artifact], seconds: dict[str, float]) -> AssignResult:
    made, embed = artifacts["assign"], artifacts.get("embed")
    return AssignResult(
        num_images=made.metrics["num_images"],
        num_errors=num_failed(embed) if embed is not None else 0,
        num_outliers=made.metrics["num_outliers"],
        num_clusters_used=made.metrics["num_clusters_used"],
        mean_confidence=made.metrics["mean_confidence"],
        assignments=made.folder.file_uri("assignments"),
        exemplars=made.folder.file_uri("exemplars.parquet"),
        drift_file=made.folder.file_uri("drift.json"),
        errors=embed.folder.file_uri("errors.parquet") if embed is not None else None,
        drift=made.read_json("drift.json"),
        seconds=seconds,
    )


def _summary(result: AssignResult, total_s: float) -> str:
    """The closing lines."""
    lines = [
        "",
        f"{result.num_images:,} images labelled, {result.num_errors:,} errors, {result.num_clusters_used:,} clusters "
        f"used, {result.num_outliers:,} outliers; {format_seconds(total_s)}",
        "against the images of the run:",
        *(f"  {line}" for line in drift_lines(result.drift)),
        f"assignments  {result.assignments}",
        f"exemplars    {result.exemplars}",
        f"drift        {result.drift_file}",
    ]
    if result.num_errors:
        lines.append(f"errors       {result.errors}")
    return "\n".join(lines)
