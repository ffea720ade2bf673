"""A sweep's diagrams as inline SVG: the metric against each setting, and all settings side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

from icce_ray.report.plots import ACCENT, SECOND, svg
from icce_ray.sweeps.search_space import LOG_RANGES, Dimension
from icce_ray.sweeps.table import Row, ranked, setting_text

COLORS = "viridis"
MAX_LABELS = 12
WIDE_INCHES = (10.4, 4.0)


def metric_by_setting(rows: Sequence[Row], dimension: Dimension, metric: str) -> str | None:
    """The metric of each finished trial against one setting, and the mean where a value occurs several times; None
    without a finished trial."""
    finished = ranked(rows, metric)
    if not finished:
        return None
    places, ticks = _positions([row.parameters.get(dimension.name) for row in finished])
    values = np.array([row.value(metric) for row in finished])

    def draw(axes: Any) -> None:
        axes.scatter(places, values, color=ACCENT, s=18, alpha=0.8)
        axes.scatter(places[:1], values[:1], color=SECOND, s=42, label=f"best: trial {finished[0].trial}")
        used = np.unique(places)
        if len(used) < len(places):
            axes.plot(used, [values[places == place].mean() for place in used], color=ACCENT, linewidth=1, alpha=0.6)
        if ticks is not None:
            axes.set_xticks(range(len(ticks)), ticks)
        elif dimension.kind in LOG_RANGES:
            axes.set_xscale("log")
        axes.set_xlabel(dimension.name)
        axes.set_ylabel(metric)
        axes.legend()

    return svg(f"setting-{dimension.name}", draw)


def parallel_coordinates(rows: Sequence[Row], dimensions: Sequence[Dimension], metric: str) -> str | None:
    """A line per finished trial through its settings to its metric, coloured by the metric; None with fewer than two
    trials."""
    finished = ranked(rows, metric)
    if len(finished) < 2:
        return None
    axes_names = [*(dimension.name for dimension in dimensions), metric]
    columns, labels = [], []
    for dimension in dimensions:
        places, ticks = _positions([row.parameters.get(dimension.name) for row in finished])
        if dimension.kind in LOG_RANGES and ticks is None:
            places = np.log10(places)
        scaled, ends = _to_unit(places)
        columns.append(scaled)
        if ticks is not None:
            spots = np.linspace(0, 1, len(ticks)) if len(ticks) > 1 else [0.5]
            labels.append(list(zip(spots, ticks, strict=True))[:MAX_LABELS])
        else:
            back = [10**end if dimension.kind in LOG_RANGES else end for end in ends]
            labels.append(_ends(*back))
    scaled, ends = _to_unit(np.array([row.value(metric) for row in finished]))
    columns.append(scaled)
    labels.append(_ends(*ends))
    colors = mpl.colormaps[COLORS]

    def draw(axes: Any) -> None:
        for trial in reversed(range(len(finished))):  # the best on top
            line = [column[trial] for column in columns]
            axes.plot(line, color=colors(scaled[trial]), linewidth=2.4 if trial == 0 else 1.2, alpha=0.9)
        for place, marks in enumerate(labels):
            axes.axvline(place, color="black", linewidth=0.8)
            for height, text in marks:
                # Not part of the layout: long words would squeeze the diagram out of its own figure.
                axes.text(place + 0.02, height, text, fontsize=8, va="center").set_in_layout(False)
        axes.set_xticks(range(len(axes_names)), axes_names)
        axes.set_xlim(-0.1, len(axes_names) - 0.8)
        axes.set_ylim(-0.05, 1.05)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)

    return svg("parallel", draw, WIDE_INCHES)


def _positions(values: Sequence[Any]) -> tuple[Any, list[str] | None]:
    """Where values lie on an axis: themselves where all are numbers, else 0, 1, ... in the order of `ticks`."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return np.array(values, dtype=float), None
    numbers = sorted({value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)})
    texts = sorted({setting_text(value) for value in values} - {setting_text(number) for number in numbers})
    ticks = [*texts, *(setting_text(number) for number in numbers)]
    return np.array([ticks.index(setting_text(value)) for value in values], dtype=float), ticks


def _ends(low: float, high: float) -> list[tuple[float, str]]:
    """What stands at the ends of an axis; in its middle where there is one value only."""
    return [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")] if high > low else [(0.5, f"{low:.3g}")]


def _to_unit(values: Any) -> tuple[Any, tuple[float, float]]:
    """Values scaled to 0..1, and what these stand for; all in the middle where they are equal."""
    low, high = float(np.min(values)), float(np.max(values))
    if high <= low:
        return np.full(len(values), 0.5), (low, high)
    return (np.asarray(values) - low) / (high - low), (low, high)
