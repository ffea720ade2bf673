"""A sweep's page: its table, its diagrams, its best config. It opens without a network."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence

import jinja2
import yaml

from icce_ray.sweeps.sweep_config import Sweep
from icce_ray.sweeps.sweep_plots import metric_by_setting
from icce_ray.sweeps.trial_table import FAILED, Row, metric_names, ranked, setting_text, shown


def render(sweep: Sweep, rows: Sequence[Row], pooled: Sequence[Row], best_yaml: str) -> str:
    """The page as HTML.

    Args:
        rows: all trials; at least one finished.
        pooled: those whose heads make the final consensus.
    """
    metric = sweep.config.metric
    order = ranked(rows, metric)
    others = [row for row in rows if row not in order]
    plots = [metric_by_setting(rows, dimension, metric) for dimension in sweep.dimensions]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shown": shown, "setting": setting_text}
    template = importlib.resources.files("icce_ray.sweeps").joinpath("sweep_page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=f"Sweep over {', '.join(sweep.names)}",
        source=sweep.source,
        metric=metric,
        trials=[*order, *others],
        best=order[0],
        best_value=shown(order[0].value(metric)),
        num_pooled=len(pooled),
        pooled={row.trial for row in pooled},
        failed=[row for row in rows if row.status == FAILED],
        names=sweep.names,
        metrics=metric_names(rows),
        scores=list(dict.fromkeys(name for row in rows for name in row.scores)),
        plots=[svg for svg in plots if svg is not None],
        best_yaml=best_yaml,
        sweep_yaml=yaml.safe_dump(
            sweep.config.model_dump(mode="json", exclude={"base"}, exclude_unset=True), sort_keys=False
        ),
    )
