"""The diagrams of the page as numbers; ``web/plots.js`` draws them.

A diagram is a dict: `heading`; `x` and `y`, each with a `label` and perhaps `log` or `ticks` (texts at 0, 1, ...);
`series`, each with a `name`, a `kind`, and the numbers `x` and `y`, of which None is left out; `marks`, lines at one
`x` or `y` with a `text`; `span`, a range of x that is shaded. Kinds: `line`, with a band between `low` and `high` if
there are any; `points`; `bars`, whose x are the edges.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icce_ray.count.stage import CLUSTER_COUNT
from icce_ray.methods.clusterings import read_history
from icce_ray.report.page_content import NUM_BINS, PageContent
from icce_ray.store import Artifact

Plot = dict[str, Any]

COUNT_METRICS = (
    ("score", "Score"),
    ("silhouette", "Silhouette"),
    ("gap", "Gap of the eigenvalues"),
    ("recurring", "Share of clusters that recur"),
)
"""Columns of by_count.parquet and their names."""


def page_plots(content: PageContent, inputs: Mapping[str, Artifact]) -> list[Plot]:
    """The diagrams that this run has data for."""
    plots = [_sizes(content), _certainty(content)]
    if "neighbors" in inputs:
        audit = inputs["neighbors"].read_json("audit.json")
        plots += [*_similarity(audit), *_by_threshold(audit)]
    plots += _training(read_history(inputs["method"]))
    if CLUSTER_COUNT.name in inputs:
        plots += _by_count(inputs[CLUSTER_COUNT.name].read_table("by_count.parquet").to_pylist())
    return plots


def plot(heading: str, x: str | Plot, y: str | Plot, series: list[Plot], **more: Any) -> Plot:
    """A diagram; an axis may be its label alone."""
    axes = [{"label": axis} if isinstance(axis, str) else axis for axis in (x, y)]
    return {"heading": heading, "x": axes[0], "y": axes[1], "series": series, "marks": [], **more}


def series(name: str, kind: str, x: Any, y: Any, **more: Any) -> Plot:
    return {"name": name, "kind": kind, "x": _numbers(x), "y": _numbers(y)} | {
        key: _numbers(values) for key, values in more.items()
    }


def _numbers(values: Any) -> list[float | None]:
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in np.asarray(values, dtype=float).tolist()]


def _sizes(content: PageContent) -> Plot:
    falling = np.sort(content.sizes)[::-1]
    mean = float(falling.mean())
    bars = series("images", "bars", np.arange(len(falling) + 1) + 0.5, falling)
    marks = [{"y": mean, "text": f"mean {mean:,.0f}"}]
    return plot("Cluster sizes", "clusters, largest first", "images", [bars], marks=marks)


def _certainty(content: PageContent) -> Plot:
    edges = np.linspace(0, 1, NUM_BINS + 1)
    found = (("agreement", content.agreement_bins), ("consensus probability", content.probability_bins))
    shown = [series(name, "bars", edges, counts) for name, counts in found if counts.sum()]
    return plot("Agreement and consensus probability", "agreement, probability", "images", shown)


def _similarity(audit: Plot) -> list[Plot]:
    edges, random_pairs, nearest = (audit.get(key) for key in ("bin_edges", "random_pairs", "nearest_pairs"))
    if not edges or not random_pairs or not nearest:
        return []
    used = np.flatnonzero(np.asarray(random_pairs) + np.asarray(nearest))
    inside = slice(int(used[0]), int(used[-1]) + 1)
    shown = [
        series(name, "bars", edges[inside.start : inside.stop + 1], np.asarray(counts)[inside] / max(sum(counts), 1))
        for name, counts in (("random pairs", random_pairs), ("nearest neighbours", nearest))
    ]
    return [plot("Similarity of images", "cosine similarity", "share of pairs", shown, marks=_threshold(audit))]


def _by_threshold(audit: Plot) -> list[Plot]:
    rows = audit.get("thresholds")
    if not rows:
        return []
    x, columns = [row["threshold"] for row in rows], ("mean_neighbors", "estimated_precision")
    mean, precision = ([row[name] for row in rows] for name in columns)
    one = series("mean number of neighbours", "line", x, np.maximum(mean, 1))
    other = series("estimated precision", "line", x, precision)
    marks = _threshold(audit)
    return [
        plot(
            "Neighbours by threshold", "similarity threshold", {"label": "neighbours", "log": True}, [one], marks=marks
        ),
        plot("Precision by threshold", "similarity threshold", "estimated precision", [other], marks=marks),
    ]


def _threshold(audit: Plot) -> list[Plot]:
    chosen = audit.get("similarity_threshold")
    kind = "automatic" if audit.get("is_automatic") else "given"
    return [] if chosen is None else [{"x": chosen, "text": f"{kind}: {chosen:.2f}"}]


def _training(history: Sequence[Plot]) -> list[Plot]:
    if len(history) < 2:
        return []
    epochs = [row["epoch"] for row in history]
    shown = [series("mean of the heads", "line", epochs, [row["loss"] for row in history])]
    if all("best_head_loss" in row for row in history):
        shown.append(series("best head", "line", epochs, [row["best_head_loss"] for row in history]))
    return [plot("Training", "epoch", "loss", shown)]


def _by_count(rows: Sequence[Plot]) -> list[Plot]:
    """Each metric by number of clusters, with a band of two standard errors over the parts of the sample."""
    numbers = [row["num_clusters"] for row in rows]
    as_good = [row["num_clusters"] for row in rows if row["as_good"]]
    chosen = next(row["num_clusters"] for row in rows if row["chosen"])
    more = {"marks": [{"x": chosen, "text": f"chosen: {chosen}"}], "span": [as_good[0], as_good[-1]]}
    plots = []
    for metric, name in COUNT_METRICS:
        mean, low, high = ([row[metric + end] for row in rows] for end in ("", "_low", "_high"))
        line = series(name.lower(), "line", numbers, mean, low=low, high=high)
        plots.append(plot(name, {"label": "clusters", "log": True}, name.lower(), [line], **more))
    return plots
