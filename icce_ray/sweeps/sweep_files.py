"""The files of a finished sweep: the table of its trials, a page with them and a diagram for each setting, which opens
without a network, and two configs that run: of the best trial, and of one consensus of the best trials.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import jinja2
import numpy as np
import yaml

from icce_ray.config import Config, without_secrets
from icce_ray.consensus.other_runs import have_same_images
from icce_ray.embed.feature_matrix import load_features
from icce_ray.errors import WorkerError
from icce_ray.images.listing import Listing
from icce_ray.pipeline.plan import fingerprints_of, finished_artifacts, plan, run_name
from icce_ray.report.page_files import read_web, to_script
from icce_ray.report.page_plots import Plot, plot, series
from icce_ray.runtime.progress import Progress
from icce_ray.sample.training_set import training_set
from icce_ray.store import Artifact, ArtifactWriter
from icce_ray.store.run_records import write_record
from icce_ray.sweeps.sweep_config import LOG_RANGES, Dimension, Sweep
from icce_ray.sweeps.trial import Listings, consensus_nmi, full_stages
from icce_ray.sweeps.trial_table import (
    Row,
    choose_best,
    choose_pool,
    metric_names,
    ranked,
    score_names,
    setting_text,
    shown,
    to_table,
    to_text,
)

TABLE_NAME, TEXT_NAME, PAGE_NAME = "trials.parquet", "trials.txt", "sweep.html"
BEST_NAME, ENSEMBLE_NAME = "best.yaml", "ensemble.yaml"


@dataclass(frozen=True)
class TrialRun:
    """A run of a finished trial, under the name that the whole job has."""

    name: str
    config: Config
    artifacts: dict[str, Artifact]


def write(sweep: Sweep, rows: Sequence[Row], listings: Listings, output: ArtifactWriter) -> dict[str, Any]:
    """Record the runs of the finished trials, score them against the true labels if there are some, choose the best,
    and write trials.parquet, trials.txt, sweep.html, best.yaml and ensemble.yaml. Returns num_trials, num_failed,
    metric, best_value, best_trial, best_parameters. Raises WorkerError: no trial has the metric; the table is written
    all the same."""
    metric = sweep.config.metric
    runs = {row.trial: _record_runs(sweep, row, listings) for row in rows if row.error is None}
    rows = [_with_scores(row, runs[row.trial]) if row.trial in runs else row for row in rows]
    rows = with_peers(rows, runs)
    try:
        best = choose_best(rows, metric)
    except WorkerError as error:
        output.write_table(TABLE_NAME, to_table(rows, sweep.names))
        raise WorkerError(f"{error}. All trials: {output.folder.file_uri(TABLE_NAME)}") from None
    what = f"{metric} {best.value(metric):.4f}: trial {best.trial} of {len(rows)}"
    best_yaml = config_yaml(runs[best.trial][0].config, f"The best of a sweep by {what}")
    output.write_bytes(BEST_NAME, best_yaml)
    pooled: list[int] = []
    if sweep.config.ensemble is not None:
        chosen = [row.trial for row in choose_pool(rows, metric, sweep.config.ensemble)]
        config, pooled = _pool({trial: runs[trial] for trial in chosen})
        names = ", ".join(map(str, pooled))
        output.write_bytes(ENSEMBLE_NAME, config_yaml(config, f"One consensus of the best trials of a sweep: {names}"))
    output.write_table(TABLE_NAME, to_table(rows, sweep.names, pooled, best.trial))
    output.write_bytes(TEXT_NAME, to_text(rows, sweep.names, metric).encode())
    output.write_bytes(PAGE_NAME, render(sweep, rows, pooled, best_yaml.decode()).encode("utf-8", errors="replace"))
    return {
        "num_trials": len(rows),
        "num_failed": sum(row.error is not None for row in rows),
        "metric": metric,
        "best_value": best.value(metric),
        "best_trial": best.trial,
        "best_parameters": best.parameters,
    }


def config_yaml(config: Config, comment: str) -> bytes:
    """A config that runs as it is: the settings that were given, without secrets, which come from the environment."""
    data: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    return f"# {comment}\n{yaml.safe_dump(without_secrets(data), sort_keys=False, allow_unicode=True)}".encode()


def _pool(runs: dict[int, list[TrialRun]]) -> tuple[Config, list[int]]:
    """The config of the first run with the clusterings of the others in its consensus, and the trials of these runs.
    Runs over other images, such as those of another sample, are left out."""
    first = next(iter(runs.values()))[0]
    names: list[str] = []
    trials = []
    for trial, each in runs.items():
        same = [run.name for run in each if have_same_images(run.artifacts["method"], first.artifacts["method"])]
        if same:
            trials.append(trial)
        else:
            Progress("sweep").note(f"trial {trial} was trained on other images; it is not pooled")
        names += [name for name in same if name != first.name]
    return first.config.with_extra_runs(names), trials


def _record_runs(sweep: Sweep, row: Row, listings: Listings) -> list[TrialRun]:
    runs = []
    for config in sweep.runs(row.parameters):
        planned = plan(config, full_stages(config, listings))
        name = run_name(planned)
        write_record(config.output, name, fingerprints_of(planned), config.model_dump(mode="json"))
        runs.append(TrialRun(name, config, finished_artifacts(planned)))
    return runs


def _with_scores(row: Row, runs: Sequence[TrialRun]) -> Row:
    scores = [score(run) for run in runs]
    means = {name: float(np.mean([each[name] for each in scores])) for name in scores[0]}
    return replace(row, runs=tuple(run.name for run in runs), scores=means)


def with_peers(rows: Sequence[Row], runs: Mapping[int, Sequence[TrialRun]]) -> list[Row]:
    """The rows with the metric `peers`: the mean NMI of a trial's clusters with those of each other trial, seed by
    seed."""
    nmi: dict[int, list[float]] = {trial: [] for trial in runs}
    for one, other in combinations(runs, 2):
        pairs = zip(runs[one], runs[other], strict=True)
        value = float(np.mean([consensus_nmi(a.artifacts, b.artifacts) for a, b in pairs]))
        nmi[one].append(value)
        nmi[other].append(value)
    means = {trial: float(np.mean(values)) for trial, values in nmi.items() if values}
    return [
        replace(row, metrics=row.metrics | {"peers": means[row.trial]}) if row.trial in means else row for row in rows
    ]


def score(run: TrialRun) -> dict[str, float]:
    """ACC, NMI and ARI of the consensus against the true labels; empty without labels."""
    from icce_ray.evaluate.labels import load_labels
    from icce_ray.metrics.true_label_scores import evaluate_with_noise

    if run.config.evaluate.labels is None:
        return {}
    listing = Listing(run.artifacts["images"])
    image_ids = load_features(training_set(run.artifacts)).image_ids
    labels = load_labels(run.config.evaluate, listing.uris(image_ids).to_pylist(), image_ids, len(listing))
    labels_N = run.artifacts["consensus"].read_array("labels.npy")
    found = evaluate_with_noise(labels.classes, labels_N[np.searchsorted(image_ids, labels.image_ids)])
    return {name: float(found[name]) for name in ("acc", "nmi", "ari")}


def metric_by_setting(rows: Sequence[Row], dimension: Dimension, metric: str) -> Plot | None:
    """The metric of each finished trial against one setting, and a line through the means if values repeat; None if no
    trial finished."""
    finished = ranked(rows, metric)
    if not finished:
        return None
    places, ticks = _positions([row.parameters.get(dimension.name) for row in finished])
    values = np.array([row.value(metric) for row in finished])
    shown = [series("trials", "points", places, values)]
    shown.append(series(f"best: trial {finished[0].trial}", "points", places[:1], values[:1]))
    used = np.unique(places)
    if len(used) < len(places):
        shown.append(series("mean", "line", used, [values[places == place].mean() for place in used]))
    axis = {"label": dimension.name, "ticks": ticks, "log": ticks is None and dimension.kind in LOG_RANGES}
    return plot(dimension.name, axis, metric, shown)


def _positions(values: Sequence[Any]) -> tuple[Any, list[str] | None]:
    """Positions of values on an axis, and its ticks: the values themselves and None if all are numbers, else 0, 1, ...
    in the order of the ticks."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return np.array(values, dtype=float), None
    numbers = sorted({value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)})
    texts = sorted({setting_text(value) for value in values} - {setting_text(number) for number in numbers})
    ticks = [*texts, *(setting_text(number) for number in numbers)]
    return np.array([ticks.index(setting_text(value)) for value in values], dtype=float), ticks


def render(sweep: Sweep, rows: Sequence[Row], pooled: Sequence[int], best_yaml: str) -> str:
    """The page as HTML. At least one of the trials `rows` finished; `pooled` make the final consensus."""
    metric = sweep.config.metric
    order = ranked(rows, metric)
    others = [row for row in rows if row not in order]
    plots = [metric_by_setting(rows, dimension, metric) for dimension in sweep.dimensions]
    return render_page(
        "sweep_page.html",
        title=f"Sweep over {', '.join(sweep.names)}",
        source=sweep.source,
        metric=metric,
        trials=[*order, *others],
        best=order[0],
        best_value=shown(order[0].value(metric)),
        pooled=set(pooled),
        failed=[row for row in rows if row.error is not None],
        names=sweep.names,
        metrics=metric_names(rows),
        scores=score_names(rows),
        plots=to_script([plot for plot in plots if plot is not None]),
        script=read_web("plots.js"),
        best_yaml=best_yaml,
        sweep_yaml=yaml.safe_dump(
            sweep.config.model_dump(mode="json", exclude={"base"}, exclude_unset=True), sort_keys=False
        ),
    )


def render_page(name: str, **values: Any) -> str:
    """A page of this folder with its values filled in."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("icce_ray", "sweeps"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "setting": setting_text}
    return environment.get_template(name).render(**values)
