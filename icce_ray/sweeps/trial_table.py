"""The trials of a sweep as rows: their ranking, and the table as Parquet and as text."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.errors import WorkerError
from icce_ray.sweeps.sweep_config import EnsembleConfig

MAX_PRINTED = 40
MAX_REASON = 100


@dataclass(frozen=True)
class Row:
    """One trial."""

    trial: int
    """Its number, from 0, in the order of creation."""
    parameters: dict[str, Any]
    """Its settings, by dotted name."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    num_clusters_used: float | None = None
    """Mean over its runs."""
    seconds: float | None = None
    """Time spent on its method, consensus and scores."""
    seeds: tuple[int, ...] = ()
    runs: tuple[str, ...] = ()
    """Names of its runs, as in `<output>/runs`."""
    scores: dict[str, float] = field(default_factory=dict)
    """Against true labels, if the base names some. Nothing is chosen by them."""
    error: str | None = None
    """Why it failed; None if it finished."""

    @property
    def status(self) -> str:
        return "finished" if self.error is None else "failed"

    def value(self, metric: str) -> float:
        """The metric of a finished trial; minus infinity if it has none."""
        value = self.metrics.get(metric) if self.error is None else None
        return -np.inf if value is None or not np.isfinite(value) else float(value)


def ranked(rows: Iterable[Row], metric: str) -> list[Row]:
    """Finished trials that have the metric, best first. Ties, such as the `peers` of two trials, go to the higher
    silhouette, then to the first."""
    usable = [row for row in rows if row.value(metric) > -np.inf]
    return sorted(usable, key=lambda row: (-row.value(metric), -row.value("silhouette_pca"), row.trial))


def choose_best(rows: Sequence[Row], metric: str) -> Row:
    """The finished trial with the highest metric. Raises WorkerError: no trial finished, or none has the metric."""
    best = ranked(rows, metric)
    if best:
        return best[0]
    what = f"sweep: no trial of {len(rows)} has the metric {metric}"
    failed = next((row for row in rows if row.error is not None), None)
    raise WorkerError(f"{what}; trial {failed.trial}: {failed.error}" if failed else f"{what}; choose another metric")


def choose_pool(rows: Sequence[Row], metric: str, ensemble: EnsembleConfig) -> list[Row]:
    """The trials whose clusterings make the final consensus, best first; the best is always among them."""
    best = ranked(rows, metric)
    if ensemble.quantile is None:
        return best[: ensemble.top]
    limit = np.quantile([row.value(metric) for row in best], ensemble.quantile)
    return [row for row in best if row.value(metric) >= limit] or best[:1]


def metric_names(rows: Iterable[Row]) -> list[str]:
    """All metrics that any trial has, without standard deviations."""
    return [name for name in _names(row.metrics for row in rows) if not name.endswith("_std")]


def score_names(rows: Iterable[Row]) -> list[str]:
    """All scores against true labels that any trial has."""
    return _names(row.scores for row in rows)


def to_table(
    rows: Sequence[Row], names: Sequence[str], pooled: Iterable[int] = (), best: int | None = None
) -> pa.Table:
    """A row per trial: trial, status, one column per setting of `names`, metrics, scores, num_clusters_used, seconds,
    seeds, runs, error, is_best, is_pooled. Settings with values of several types are written as JSON."""
    chosen = set(pooled)
    columns: dict[str, Any] = {
        "trial": pa.array([row.trial for row in rows], pa.int32()),
        "status": pa.array([row.status for row in rows], pa.string()),
    }
    for name in names:
        columns[name] = _column([row.parameters.get(name) for row in rows])
    for name in _names({**row.metrics, **row.scores} for row in rows):
        columns[name] = pa.array([row.metrics.get(name, row.scores.get(name)) for row in rows], pa.float64())
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
    """The table for a terminal: the best trials first, failed ones last with their reason."""
    metrics = sorted(metric_names(rows), key=lambda name: name != metric)
    scores = score_names(rows)
    order = ranked(rows, metric)
    order += [row for row in rows if row not in order and row.error is None]
    lines = [["trial", *names, *metrics, *scores, ""]]
    for row in order[:MAX_PRINTED]:
        values = [setting_text(row.parameters.get(name)) for name in names]
        figures = [shown(row.metrics.get(name)) for name in metrics] + [shown(row.scores.get(name)) for name in scores]
        lines.append([str(row.trial), *values, *figures, "best" if row is order[0] else ""])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if len(order) > MAX_PRINTED:
        text.append(f"and {len(order) - MAX_PRINTED} more")
    for row in rows:
        if row.error is not None:
            text.append(f"trial {row.trial} failed ({parameters_text(row.parameters)}): {row.error[:MAX_REASON]}")
    return "\n".join(text)


def shown(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def setting_text(value: Any) -> str:
    """A setting as in YAML, floats shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else shown(value)


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """``heads.num_heads=8, num_clusters=5``."""
    return ", ".join(f"{name}={setting_text(value)}" for name, value in parameters.items())


def _names(figures: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for each in figures for name in each))


def _column(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or kinds in ({str}, {bool}):
        return pa.array(values)
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
