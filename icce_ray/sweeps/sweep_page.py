"""The page of a sweep: its trials, a diagram for each setting, the best config. It opens without a network."""

from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
import yaml

from icce_ray.report.page_files import read_web, to_script
from icce_ray.report.page_plots import Plot, plot, series
from icce_ray.sweeps.sweep_config import LOG_RANGES, Dimension, Sweep
from icce_ray.sweeps.trial_table import Row, metric_names, ranked, score_names, setting_text, shown


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
