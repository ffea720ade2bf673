"""The diagrams of a sweep: the metric against each setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from icce_ray.report.page_plots import Plot, plot, series
from icce_ray.sweeps.search_space import LOG_RANGES, Dimension
from icce_ray.sweeps.trial_table import Row, ranked, setting_text


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
