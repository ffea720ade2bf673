"""The end of a sweep: what is written of its trials, and the config of the job that pools the best of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from icce_ray.config import Config
from icce_ray.consensus.extra_runs import have_same_images
from icce_ray.embed.feature_matrix import load_features
from icce_ray.errors import WorkerError
from icce_ray.images.listing import Listing
from icce_ray.pipeline.plan import fingerprints_of, plan, run_name
from icce_ray.pipeline.result import Result
from icce_ray.runtime.progress import Progress, format_seconds
from icce_ray.sample.training_set import training_set
from icce_ray.store import Artifact, ArtifactWriter
from icce_ray.store.run_records import write_record
from icce_ray.sweeps.sweep_config import Sweep
from icce_ray.sweeps.sweep_page import render
from icce_ray.sweeps.trial import TRAINED, Listings, full_stages
from icce_ray.sweeps.trial_table import (
    FAILED,
    FINISHED,
    Row,
    choose_best,
    choose_pool,
    config_yaml,
    setting_text,
    to_table,
    to_text,
    with_extra_runs,
)

TABLE_NAME, TEXT_NAME, PAGE_NAME = "trials.parquet", "trials.txt", "sweep.html"
BEST_NAME, ENSEMBLE_NAME = "best.yaml", "ensemble.yaml"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found and where it lies."""

    num_trials: int
    num_failed: int
    metric: str
    """What the best trial has most of."""
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
    """The same for the pooled heads; None where the sweep asks for none."""
    ensemble: Result | None
    """What that job made."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write(sweep: Sweep, rows: Sequence[Row], listings: Listings, output: ArtifactWriter) -> dict[str, Any]:
    """Name the runs of the finished trials and record them, score them where there are true labels, choose the best,
    and write trials.parquet, trials.txt, sweep.html, best.yaml and ensemble.yaml.

    Returns:
        num_trials, num_failed, metric, best_value, best_trial, best_parameters.

    Raises:
        WorkerError: no trial has the metric; the table is written all the same.
    """
    metric = sweep.config.metric
    runs = {row.trial: _find_runs(sweep, row, listings) for row in rows if row.status == FINISHED}
    rows = [_complete(row, runs[row.trial]) if row.trial in runs else row for row in rows]
    try:
        best = choose_best(rows, metric)
    except WorkerError as error:
        output.write_table(TABLE_NAME, to_table(rows, sweep.names))
        raise WorkerError(f"{error}. All trials: {output.folder.file_uri(TABLE_NAME)}") from None
    pooled = _choose_pool(sweep, rows, runs) if sweep.config.ensemble is not None else []
    what = f"{metric} {best.value(metric):.4f}: trial {best.trial} of {len(rows)}"
    best_yaml = config_yaml(runs[best.trial][0].config, f"The best of a sweep by {what}")
    output.write_bytes(BEST_NAME, best_yaml)
    if pooled:
        config = pool_config([run for row in pooled for run in runs[row.trial]])
        names = ", ".join(str(row.trial) for row in pooled)
        output.write_bytes(ENSEMBLE_NAME, config_yaml(config, f"The heads of the best trials of a sweep: {names}"))
    output.write_table(TABLE_NAME, to_table(rows, sweep.names, [row.trial for row in pooled], best.trial))
    output.write_bytes(TEXT_NAME, to_text(rows, sweep.names, metric).encode())
    page = render(sweep, rows, pooled, best_yaml.decode())
    output.write_bytes(PAGE_NAME, page.encode("utf-8", errors="replace"))
    return {
        "num_trials": len(rows),
        "num_failed": sum(row.status == FAILED for row in rows),
        "metric": metric,
        "best_value": best.value(metric),
        "best_trial": best.trial,
        "best_parameters": best.parameters,
    }


def lie_there(sweep: Sweep, rows: Sequence[Row], listings: Listings) -> bool:
    """Whether all that the finished trials made is on storage; someone may have removed it since."""
    finished = [row for row in rows if row.status == FINISHED]
    steps = [
        step
        for row in finished
        for config in sweep.runs(row.parameters)
        for step in plan(config, full_stages(config, listings))
        if step.name in TRAINED
    ]
    return all(step.artifact is not None for step in steps)


def pool_config(runs: Sequence[FoundRun]) -> Config:
    """The config of the first run, with the heads of the others in its consensus. Runs over other images, such as
    those of another sample, are left out."""
    first = runs[0]
    names = [run.name for run in runs[1:] if have_same_images(run.artifacts["method"], first.artifacts["method"])]
    return with_extra_runs(first.config, [name for name in names if name != first.name])


def sum_up(artifact: Artifact, ensemble: Result | None) -> SweepResult:
    """What a finished sweep ends with."""
    place = artifact.folder.file_uri
    has_ensemble = bool(artifact.part_names(ENSEMBLE_NAME))
    return SweepResult(
        **artifact.metrics,
        table=place(TABLE_NAME),
        report=place(PAGE_NAME),
        best_config=place(BEST_NAME),
        ensemble_config=place(ENSEMBLE_NAME) if has_ensemble else None,
        ensemble=ensemble,
    )


def print_summary(artifact: Artifact, result: SweepResult, total_s: float) -> None:
    """The closing lines of a sweep, on standard error."""
    counts = f"{result.num_trials} trials, {result.num_failed} failed"
    given = ", ".join(f"{name}={setting_text(value)}" for name, value in result.best_parameters.items())
    lines = [
        "",
        artifact.read_bytes(TEXT_NAME).decode(),
        "",
        f"{counts}; {format_seconds(total_s)}",
        f"best         trial {result.best_trial}, {result.metric} {result.best_value:.4f}: {given}",
        f"table        {result.table}",
        f"report       {result.report}",
        f"best config  {result.best_config}",
    ]
    if result.ensemble_config is not None:
        lines.append(f"ensemble     {result.ensemble_config}")
    print("\n".join(lines), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class FoundRun:
    """A run of a finished trial, under the name that the whole job has."""

    name: str
    config: Config
    artifacts: dict[str, Artifact]


def _find_runs(sweep: Sweep, row: Row, listings: Listings) -> list[FoundRun]:
    found = []
    for config in sweep.runs(row.parameters):
        planned = plan(config, full_stages(config, listings))
        artifacts = {step.name: step.artifact for step in planned if step.artifact is not None}
        assert set(TRAINED) <= artifacts.keys()
        name = run_name(planned)
        write_record(config.output, name, fingerprints_of(planned), config.model_dump(mode="json"))
        found.append(FoundRun(name, config, artifacts))
    return found


def _complete(row: Row, runs: Sequence[FoundRun]) -> Row:
    scores = [score(run) for run in runs]
    means = {name: float(np.mean([each[name] for each in scores])) for name in scores[0]}
    return replace(row, runs=tuple(run.name for run in runs), scores=means)


def score(run: FoundRun) -> dict[str, float]:
    """ACC, NMI and ARI of the consensus against the true labels; empty without labels."""
    from icce_ray.evaluate.labels import load_labels
    from icce_ray.metrics.true_label_scores import evaluate_clustering

    if run.config.evaluate.labels is None:
        return {}
    listing = Listing(run.artifacts["images"])
    image_ids = load_features(training_set(run.artifacts)).image_ids
    labels = load_labels(run.config.evaluate, listing.table(0, len(listing))["uri"].to_pylist(), image_ids)
    found = evaluate_clustering(labels.classes, run.artifacts["consensus"].read_array("labels.npy"))
    return {name: float(found[name]) for name in ("acc", "nmi", "ari")}


def _choose_pool(sweep: Sweep, rows: Sequence[Row], runs: dict[int, list[FoundRun]]) -> list[Row]:
    assert sweep.config.ensemble is not None
    pooled = choose_pool(rows, sweep.config.metric, sweep.config.ensemble)
    first = runs[pooled[0].trial][0].artifacts["method"]
    same = [row for row in pooled if have_same_images(runs[row.trial][0].artifacts["method"], first)]
    for row in pooled:
        if row not in same:
            Progress("sweep", "trials").note(f"trial {row.trial} was trained on other images; it is not pooled")
    return same
