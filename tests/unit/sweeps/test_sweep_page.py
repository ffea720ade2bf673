from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from icce_ray.sweeps.sweep_config import Sweep, build_sweep
from icce_ray.sweeps.sweep_files import metric_by_setting, render
from icce_ray.sweeps.trial_table import Row

SPACE = {
    "neighbors.similarity_threshold": ["auto", None, 0.4],
    "heads.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "heads.sinkhorn": [True, False],
    "num_clusters": {"randint": [3, 9]},
}
ANMI = (0.31, 0.87, 0.42, 0.55, 0.63, 0.29, 0.44)


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
            {
                "neighbors.similarity_threshold": thresholds[trial % 3],
                "heads.learning_rate": float(10 ** generator.uniform(-4, -2)),
                "heads.sinkhorn": bool(trial % 2),
                "num_clusters": int(generator.integers(3, 10)),
            },
            {"anmi": anmi, "anmi_std": 0.01, "generalization": None},
            seconds=1.0,
            scores={"acc": 0.5},
        )
        for trial, anmi in enumerate(ANMI)
    ]
    failed = Row(len(ANMI), dict.fromkeys(SPACE, 1), error="it <failed> & ended")
    return [*finished, failed]


def test_the_page_shows_every_trial_and_links_to_nothing(asked: Sweep, rows: list[Row]) -> None:
    page = render(asked, rows, [1, 4], "best: yaml")
    HTMLParser().feed(page)
    assert "it &lt;failed&gt; &amp; ended" in page
    assert "a &lt;b&gt; sweep.yaml" in page
    assert "<pre>best: yaml</pre>" in page
    table = page[page.index("<h2>Trials") : page.index("<h2>Failed")]
    assert re.findall(r"<tr[^>]*><td>(\d)</td>", table) == ["1", "4", "3", "6", "2", "0", "5", "7"], "best first"
    assert re.findall(r'<tr class="best"><td>(\d)', table) == ["1"]
    assert re.findall(r"<td>(0\.\d+) ± 0.01</td>", table) == [f"{value:g}" for value in sorted(ANMI, reverse=True)]
    assert table.count("finished, pooled") == 2
    assert len(json.loads(re.search(r"\.append\(\.\.\.(.*)\.map\(drawPlot\)\)", page)[1])) == len(SPACE)
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page)


def test_every_kind_of_setting_has_its_diagram(asked: Sweep, rows: list[Row]) -> None:
    for dimension in asked.dimensions:
        plot = metric_by_setting(rows, dimension, "anmi")
        assert plot is not None
        assert plot["x"]["label"] == dimension.name
        assert plot["series"][1]["name"] == "best: trial 1"
        assert (len(plot["series"][0]["y"]), plot["series"][1]["y"]) == (7, [0.87])
    threshold = metric_by_setting(rows, asked.dimensions[0], "anmi")
    assert threshold is not None
    assert threshold["x"]["ticks"] == ["auto", "null", "0.4"]
    assert threshold["series"][2]["x"] == [0, 1, 2]
    means = [np.mean([ANMI[trial] for trial in trials]) for trials in ((0, 3, 6), (1, 4), (2, 5))]
    assert threshold["series"][2]["y"] == pytest.approx(means)
    assert metric_by_setting(rows[7:], asked.dimensions[0], "anmi") is None, "no trial finished"
