"""What a sweep found: a row per trial, the best, the table as Parquet and as text, and configs that run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from icce_ray.config import Config
from icce_ray.errors import WorkerError
from icce_ray.sweeps.sweep_config import EnsembleConfig

FINISHED, FAILED = "finished", "failed"
MAX_PRINTED = 40
MAX_REASON = 100
SECRETS = ("access_key", "secret_key", "session_token")


@dataclass(frozen=True)
class Row:
    """One trial."""

    trial: int
    """In the order in which trials were made, from 0."""
    status: str
    """`finished` or `failed`."""
    parameters: dict[str, Any]
    """What it was given, by dotted name."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    num_clusters_used: float | None = None
    """Mean over its runs."""
    seconds: float | None = None
    """Of its heads, consensus and metrics."""
    seeds: tuple[int, ...] = ()
    runs: tuple[str, ...] = ()
    """Names of its runs, as in `<output>/runs`."""
    scores: dict[str, float] = field(default_factory=dict)
    """Against true labels, where the base names some. Nothing is chosen by them."""
    error: str | None = None
    """Why it failed."""

    def value(self, metric: str) -> float:
        """Of a finished trial; minus infinity where there is none."""
        value = self.metrics.get(metric) if self.status == FINISHED else None
        return -np.inf if value is None or not np.isfinite(value) else float(value)


def ranked(rows: Iterable[Row], metric: str) -> list[Row]:
    """Finished trials that have the metric, best first; equals in their order."""
    usable = [row for row in rows if row.value(metric) > -np.inf]
    return sorted(usable, key=lambda row: (-row.value(metric), row.trial))


def choose_best(rows: Sequence[Row], metric: str) -> Row:
    """The finished trial with most of the metric.

    Raises:
        WorkerError: no trial finished, or none has the metric.
    """
    best = ranked(rows, metric)
    if best:
        return best[0]
    what = f"sweep: no trial of {len(rows)} has the metric {metric}"
    failed = [row for row in rows if row.status == FAILED]
    if failed:
        raise WorkerError(f"{what}; trial {failed[0].trial}: {failed[0].error}")
    raise WorkerError(f"{what}; choose another metric")


def choose_pool(rows: Sequence[Row], metric: str, ensemble: EnsembleConfig) -> list[Row]:
    """The trials whose heads make the final consensus, best first: the best is always among them."""
    best = ranked(rows, metric)
    if ensemble.quantile is None:
        return best[: ensemble.top]
    limit = np.quantile([row.value(metric) for row in best], ensemble.quantile)
    return [row for row in best if row.value(metric) >= limit] or best[:1]


def metric_names(rows: Iterable[Row]) -> list[str]:
    """Of all metrics that any trial has, deviations left out."""
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    return [name for name in names if not name.endswith("_std")]


def to_table(
    rows: Sequence[Row], names: Sequence[str], pooled: Iterable[int] = (), best: int | None = None
) -> pa.Table:
    """A row per trial: trial, status, one column per setting of `names`, metrics, scores, num_clusters_used,
    seconds, seeds, runs, error, is_best, is_pooled. Settings whose values are of several types are written as JSON."""
    chosen = set(pooled)
    columns: dict[str, Any] = {
        "trial": pa.array([row.trial for row in rows], pa.int32()),
        "status": pa.array([row.status for row in rows], pa.string()),
    }
    for name in names:
        columns[name] = _column([row.parameters.get(name) for row in rows])
    for name in dict.fromkeys(name for row in rows for name in (*row.metrics, *row.scores)):
        values = [row.metrics.get(name, row.scores.get(name)) for row in rows]
        columns[name] = pa.array(values, pa.float64())
    columns |= {
        "num_clusters_used": pa.array([row.num_clusters_used for row in rows], pa.float64()),
        "seconds": pa.array([row.seconds for row in rows], pa.float64()),
        "seeds": pa.array([list(row.seeds) for row in rows], pa.list_(pa.int64())),
        "runs": pa.array([list(row.runs) for row in rows], pa.list_(pa.string())),
        "error": pa.array([row.error for row in rows], pa.string()),
        "is_best": pa.array([row.trial == best for row in rows], pa.bool_()),
        "is_pooled": pa.array([row.trial in chosen for row in rows], pa.bool_()),
    }
    return pa.table(columns)


def to_text(rows: Sequence[Row], names: Sequence[str], metric: str) -> str:
    """The table for a terminal, best first; what failed comes last, with its reason."""
    metrics = sorted(metric_names(rows), key=lambda name: name != metric)
    scores = list(dict.fromkeys(name for row in rows for name in row.scores))
    order = ranked(rows, metric)
    order += [row for row in rows if row not in order and row.status != FAILED]
    lines = [["trial", *names, *metrics, *scores, ""]]
    for row in order[:MAX_PRINTED]:
        values = [setting_text(row.parameters.get(name)) for name in names]
        figures = [shown(row.metrics.get(name)) for name in metrics] + [shown(row.scores.get(name)) for name in scores]
        note = "best" if row is order[0] and row.status == FINISHED else "" if row.status == FINISHED else row.status
        lines.append([str(row.trial), *values, *figures, note])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if len(order) > MAX_PRINTED:
        text.append(f"and {len(order) - MAX_PRINTED} more")
    for row in rows:
        if row.status == FAILED:
            given = ", ".join(f"{name}={setting_text(value)}" for name, value in row.parameters.items())
            text.append(f"trial {row.trial} failed ({given}): {(row.error or '')[:MAX_REASON]}")
    return "\n".join(text)


def shown(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def setting_text(value: Any) -> str:
    """A setting as YAML says it, floats shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else shown(value)


def config_yaml(config: Config, comment: str) -> bytes:
    """A config that runs as it is: what was given, without secrets, which come from the environment."""
    data: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    storage = {key: value for key, value in data.pop("storage", {}).items() if key not in SECRETS}
    data |= {"storage": storage} if storage else {}
    return f"# {comment}\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}".encode()


def with_extra_runs(config: Config, runs: Sequence[str]) -> Config:
    """The config whose consensus takes in the heads of other runs."""
    extra = tuple(dict.fromkeys((*config.consensus.extra_runs, *runs)))
    given = config.consensus.model_dump(exclude_unset=True) | {"extra_runs": extra}
    consensus = type(config.consensus).model_validate(given)
    return config.model_copy(update={"consensus": consensus})


def _column(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if len(kinds) <= 1 and kinds <= {int, float, str, bool}:
        return pa.array(values)
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())


def from_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Plain Python values of what a search drew."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
