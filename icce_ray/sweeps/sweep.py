"""The sweep command: trials over a search space, judged without labels, then one consensus of the best.

The stages that trials share run first, once each, on the whole cluster; then the trials run side by side. Artifacts
are found by their fingerprints, so the same command resumes a sweep that was killed.
"""

import sys
import time
from dataclasses import dataclass
from typing import Any

import yaml

from icce_ray.config import build_config
from icce_ray.errors import ResourceError
from icce_ray.pipeline.plan import plan, stages_of
from icce_ray.pipeline.result import Result
from icce_ray.pipeline.run import run_pipeline
from icce_ray.runtime.progress import Progress, format_seconds
from icce_ray.store import Artifact, ArtifactWriter, Claim, Folder, fingerprint
from icce_ray.store.part_records import PartRecords
from icce_ray.sweeps.silhouette_spaces import spaces
from icce_ray.sweeps.sweep_config import Sweep
from icce_ray.sweeps.sweep_files import BEST_NAME, ENSEMBLE_NAME, PAGE_NAME, TABLE_NAME, TEXT_NAME, write
from icce_ray.sweeps.trial import Listings, key_of, make, reason_of, shared_stages
from icce_ray.sweeps.trial_table import parameters_text

VERSION = 2
STAGE = "sweep"


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep."""

    num_trials: int
    num_failed: int
    metric: str
    """The metric that chose the best trial."""
    best_value: float
    best_trial: int
    best_parameters: dict[str, Any]
    table: str
    """Parquet: a row per trial."""
    report: str
    """An HTML page."""
    best_config: str
    """YAML that runs as it is."""
    ensemble_config: str | None
    """The same for one consensus of the best trials; None if the sweep asks for none."""
    ensemble: Result | None
    """The result of that job."""


def run_sweep(asked: Sweep, *, quiet: bool = False) -> SweepResult:
    """Run a sweep, then the job that pools its best trials. Whatever is finished is used again. Raises UserError:
    something in the sweep, its base or the machine cannot work; raised before the long work where that can be known;
    WorkerError: no trial finished."""
    started = time.monotonic()
    base, listings = asked.base_config, Listings()
    images = plan(base, shared_stages(base, listings))[0]
    name = fingerprint(STAGE, VERSION, asked.settings(), {"images": images.fingerprint})
    folder = Folder.at(base.output) / STAGE / name
    artifact = Artifact.find(folder)
    if artifact is None or artifact.metrics["num_failed"]:
        _check(asked)
        with Claim(folder) as claim:
            artifact = _search(asked, listings, claim.folder, name, quiet)
    if not quiet:
        print(_summary(artifact, time.monotonic() - started), file=sys.stderr, flush=True)
    ensemble = None
    if asked.config.ensemble is not None:
        pooled = build_config(yaml.safe_load(artifact.read_bytes(ENSEMBLE_NAME)), ENSEMBLE_NAME)
        # Secrets and machines are those of today's base.
        update = {"storage": base.storage, "resources": base.resources}
        ensemble = run_pipeline(pooled.model_copy(update=update), quiet=quiet)
    return _result(artifact, ensemble)


def _search(asked: Sweep, listings: Listings, folder: Folder, name: str, quiet: bool) -> Artifact:
    from icce_ray.sweeps.job import draw, run_trials

    began = time.monotonic()
    Artifact.discard_damage(folder)
    known = draw(asked)
    failures = _make_shared(asked, known or [{}], listings, quiet)
    records = PartRecords(folder, name)
    rows = run_trials(asked, known, listings, failures, records, Progress(STAGE, "trials", quiet))
    writer = ArtifactWriter(folder)
    metrics = write(asked, rows, listings, writer)
    artifact = writer.commit(
        stage=STAGE,
        fingerprint=name,
        inputs={},
        config=asked.base_config.model_dump(mode="json"),
        metrics=metrics,
        seconds=time.monotonic() - began,
    )
    if not metrics["num_failed"]:
        records.clear()
    return artifact


def _make_shared(asked: Sweep, trials: list[dict[str, Any]], listings: Listings, quiet: bool) -> dict[str, str]:
    """Make the stages that trials share, each once. Returns why that is impossible, for the trials for which it is.
    Raises UserError, WorkerError: it is impossible for all."""
    failures: dict[str, str] = {}
    first: Exception | None = None
    for parameters in trials:
        try:
            for config in asked.runs(parameters):
                make(config, shared_stages(config, listings), quiet=quiet)
        except Exception as error:
            first = first or error
            failures[key_of(parameters)] = reason_of(error)
    if first is not None and len(failures) == len(trials):
        raise first
    return failures


def _check(asked: Sweep) -> None:
    """Refuse what is known to fail before the work starts."""
    from icce_ray.runtime.cluster_resources import STAGES_WITH_WORKERS, check_resources, largest_machine_cpus
    from icce_ray.runtime.ray_cluster import connect
    from icce_ray.sweeps.job import make_searcher

    base, config = asked.base_config, asked.config
    for stage in stages_of(base):
        if stage.check is not None:
            stage.check(stage.config_of(base))
    if config.searcher is not None:
        make_searcher(config.searcher, config.seed, [])
    if config.metric == "silhouette_umap" and "umap" not in spaces():
        raise ResourceError(
            "metric silhouette_umap needs the package umap-learn: pip install 'icce_ray[umap]', or take silhouette_pca"
        )
    check_resources(base, STAGES_WITH_WORKERS)
    connect(base.resources)
    wanted, there = config.cpus_per_run, largest_machine_cpus()
    if asked.is_in_one_process and wanted > there:
        raise ResourceError(
            f"cpus_per_run: {wanted:g} CPUs asked for, but the largest machine has {there:g}; set it to at most that"
        )


def _result(artifact: Artifact, ensemble: Result | None) -> SweepResult:
    place = artifact.folder.file_uri
    return SweepResult(
        **artifact.metrics,
        table=place(TABLE_NAME),
        report=place(PAGE_NAME),
        best_config=place(BEST_NAME),
        ensemble_config=place(ENSEMBLE_NAME) if artifact.part_names(ENSEMBLE_NAME) else None,
        ensemble=ensemble,
    )


def _summary(artifact: Artifact, total_s: float) -> str:
    """The closing lines of a sweep."""
    result = _result(artifact, None)
    best = f"{result.metric} {result.best_value:.4f}: {parameters_text(result.best_parameters)}"
    lines = [
        "",
        artifact.read_bytes(TEXT_NAME).decode(),
        "",
        f"{result.num_trials} trials, {result.num_failed} failed; {format_seconds(total_s)}",
        f"best         trial {result.best_trial}, {best}",
        f"table        {result.table}",
        f"report       {result.report}",
        f"best config  {result.best_config}",
    ]
    if result.ensemble_config is not None:
        lines.append(f"ensemble     {result.ensemble_config}")
    return "\n".join(lines)
