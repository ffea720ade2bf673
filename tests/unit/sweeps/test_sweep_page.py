from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from icce_ray.sweeps.search_space import parse_space
from icce_ray.sweeps.sweep_config import Sweep, build_sweep
from icce_ray.sweeps.sweep_page import render
from icce_ray.sweeps.sweep_plots import metric_by_setting
from icce_ray.sweeps.trial_table import Row

SPACE = {
    "neighbors.similarity_threshold": ["auto", None, 0.4],
    "heads.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "heads.sinkhorn": [True, False],
    "num_clusters": {"randint": [3, 9]},
}


@pytest.fixture
def asked() -> Sweep:
    base = {"embeddings": {"uri": "x.npy"}, "num_clusters": 5, "output": "out"}
    return build_sweep({"base": base, "space": SPACE, "metric": "anmi"}, "a <b> sweep.yaml")


@pytest.fixture
def rows() -> list[Row]:
    generator = np.random.default_rng(0)
    thresholds = ["auto", None, 0.4]
    finished = [
        Row(
            trial,
            "finished",
            {
                "neighbors.similarity_threshold": thresholds[trial % 3],
                "heads.learning_rate": float(10 ** generator.uniform(-4, -2)),
                "heads.sinkhorn": bool(trial % 2),
                "num_clusters": int(generator.integers(3, 10)),
            },
            {"anmi": float(generator.random()), "anmi_std": 0.01, "generalization": None},
            seconds=1.0,
            scores={"acc": 0.5},
        )
        for trial in range(7)
    ]
    failed = Row(7, "failed", dict.fromkeys(SPACE, 1), error="it <failed> & ended")
    return [*finished, failed]


def test_the_page_shows_every_trial_and_links_to_nothing(asked: Sweep, rows: list[Row]) -> None:
    best = max(rows, key=lambda row: row.value("anmi"))
    page = render(asked, rows, [best], "best: yaml")
    HTMLParser().feed(page)
    assert "it &lt;failed&gt; &amp; ended" in page
    assert "a &lt;b&gt; sweep.yaml" in page
    assert "best: yaml" in page
    assert len(re.findall(r"<tr[ >]", page)) == 1 + len(rows) + 2
    assert page.count("<svg") == len(SPACE)
    assert page.count("finished, pooled") == 1
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page)


def test_every_kind_of_setting_has_its_diagram(asked: Sweep, rows: list[Row]) -> None:
    for dimension in asked.dimensions:
        svg = metric_by_setting(rows, dimension, "anmi")
        assert svg is not None
        assert dimension.name in svg
    threshold = metric_by_setting(rows, asked.dimensions[0], "anmi")
    assert threshold is not None
    assert all(f">{text}<" in threshold for text in ("auto", "null", "0.4"))


def test_without_trials_to_compare_there_is_no_diagram(asked: Sweep, rows: list[Row]) -> None:
    assert metric_by_setting(rows[7:], asked.dimensions[0], "anmi") is None


def test_one_value_and_equal_metrics_can_be_drawn(rows: list[Row]) -> None:
    dimensions = parse_space({"num_clusters": [5], "heads.learning_rate": {"loguniform": [1e-3, 1e-2]}}, "s")
    same = [
        Row(trial, "finished", {"num_clusters": 5, "heads.learning_rate": 1e-3}, {"anmi": 0.5}) for trial in range(3)
    ]
    assert metric_by_setting(same, dimensions[0], "anmi") is not None
