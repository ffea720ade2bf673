"""Diagrams as inline SVG: text stays text, black becomes the page's text colour, nothing is loaded from elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import dendrogram

from icce_ray.consensus.hierarchy import Hierarchy

ACCENT, SECOND = "#3b7dd8", "#d8823b"
SIZE_INCHES = (5.2, 2.6)
MAX_LEAVES = 60
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def similarity_histogram(audit: dict[str, Any]) -> str | None:
    """Cosine similarity of random pairs and of nearest neighbours, with the threshold; None if the audit has none."""
    edges, random_pairs, nearest = (audit.get(key) for key in ("bin_edges", "random_pairs", "nearest_pairs"))
    if not edges or not random_pairs or not nearest:
        return None

    def draw(axes: Any) -> None:
        for counts, color, label in ((random_pairs, ACCENT, "random pairs"), (nearest, SECOND, "nearest neighbours")):
            shares = np.asarray(counts, dtype=float) / max(sum(counts), 1)
            axes.stairs(shares, edges, fill=True, color=color, alpha=0.55, label=label)
        used = np.flatnonzero(np.asarray(random_pairs) + np.asarray(nearest))
        axes.set_xlim(edges[used[0]] - 0.02, edges[used[-1] + 1] + 0.02)
        threshold = audit.get("similarity_threshold")
        if threshold is not None:
            axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:.2f}")
        axes.set_xlabel("cosine similarity")
        axes.set_ylabel("share of pairs")
        axes.legend()

    return svg("similarity", draw)


def neighbors_by_threshold(audit: dict[str, Any]) -> str | None:
    """Mean number of neighbours and their estimated precision by threshold; None if the audit has none."""
    rows = audit.get("thresholds")
    if not rows:
        return None

    def draw(axes: Any) -> None:
        thresholds = [row["threshold"] for row in rows]
        axes.plot(thresholds, [max(row["mean_neighbors"], 1) for row in rows], color=ACCENT)
        axes.set_yscale("log")
        axes.set_xlabel("similarity threshold")
        axes.set_ylabel("mean number of neighbours", color=ACCENT)
        right = axes.twinx()
        right.plot(thresholds, [100 * row["estimated_precision"] for row in rows], color=SECOND)
        right.set_ylim(0, 102)
        right.set_ylabel("estimated precision, %", color=SECOND)
        right.spines["right"].set_visible(True)
        chosen = audit.get("similarity_threshold")
        if chosen is not None:
            label = f"{'automatic' if audit.get('is_automatic') else 'given'}: {chosen:.2f}"
            axes.axvline(chosen, color="black", linestyle="--", linewidth=1, label=label)
            axes.legend(loc="lower left")

    return svg("thresholds", draw)


def cluster_count_curve(rows: Sequence[dict[str, Any]], metrics: Sequence[tuple[str, str]], name: str) -> str:
    """Two metrics by number of clusters, with a band of two standard errors over seeds, and the number chosen.

    Args:
        rows: of by_count.parquet.
        metrics: column and label for the left axis and for the right one.
        name: name of the diagram, unique on the page.
    """

    def draw(axes: Any) -> None:
        numbers = [row["num_clusters"] for row in rows]
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        for side, (metric, label), color in zip((axes, right), metrics, (ACCENT, SECOND), strict=True):
            side.plot(numbers, [row[metric] for row in rows], color=color, marker=".", markersize=4, linewidth=1.2)
            low, high = ([row[f"{metric}_{end}"] for row in rows] for end in ("low", "high"))
            side.fill_between(numbers, low, high, color=color, alpha=0.25, linewidth=0)
            side.set_ylabel(label, color=color)
        as_good = [row["num_clusters"] for row in rows if row["as_good"]]
        axes.axvspan(as_good[0], as_good[-1], color="black", alpha=0.08, linewidth=0)
        chosen = next(row["num_clusters"] for row in rows if row["chosen"])
        axes.axvline(chosen, color="black", linestyle="--", linewidth=1)
        axes.set_xscale("log")
        ticks = [number for number in (2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000) if numbers[0] <= number]
        ticks = sorted({numbers[0], numbers[-1], *(number for number in ticks if number <= numbers[-1])})
        axes.set_xticks(ticks, [str(number) for number in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"clusters (chosen: {chosen})")

    return svg(name, draw)


def merge_tree(hierarchy: Hierarchy) -> str | None:
    """Dendrogram of the last merges, by similarity; None for a single cluster."""
    if hierarchy.num_clusters < 2:
        return None
    num_leaves = np.concatenate([np.ones(hierarchy.num_clusters), np.zeros(len(hierarchy.left))])
    for step, (left, right) in enumerate(zip(hierarchy.left, hierarchy.right, strict=True)):
        num_leaves[hierarchy.num_clusters + step] = num_leaves[left] + num_leaves[right]
    heights = 1.0 - hierarchy.similarity
    linkage = np.column_stack([hierarchy.left, hierarchy.right, heights, num_leaves[hierarchy.num_clusters :]])

    def draw(axes: Any) -> None:
        tree = dendrogram(linkage, truncate_mode="lastp", p=MAX_LEAVES, no_plot=True)
        for across, up in zip(tree["icoord"], tree["dcoord"], strict=True):
            axes.plot(across, up, color=ACCENT, linewidth=1)
        places = 10 * np.arange(len(tree["ivl"])) + 5
        axes.set_xticks(places, tree["ivl"], rotation=90, fontsize=6)
        axes.set_ylim(min(heights[-MAX_LEAVES:]) - 0.02, 1.0)
        ticks = [tick for tick in axes.get_yticks() if tick <= 1.0]
        axes.set_yticks(ticks, [f"{1 - tick:.2g}" for tick in ticks])
        axes.set_ylabel("share of heads that merge them")
        axes.set_xlabel("cluster; (n): n clusters merged before")

    return svg("tree", draw)


def training_curve(history: Sequence[dict[str, Any]]) -> str | None:
    """Mean and lowest loss of the heads by epoch; None for fewer than two epochs."""
    if len(history) < 2:
        return None

    def draw(axes: Any) -> None:
        epochs = [entry["epoch"] for entry in history]
        axes.plot(epochs, [entry["loss"] for entry in history], color=ACCENT, label="mean of the heads")
        if all("best_head_loss" in entry for entry in history):
            axes.plot(epochs, [entry["best_head_loss"] for entry in history], color=SECOND, label="best head")
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss")
        axes.legend()

    return svg("training", draw)


def size_chart(sizes_K: npt.NDArray[np.int64]) -> str:
    """Images per cluster, largest first."""

    def draw(axes: Any) -> None:
        falling = np.sort(sizes_K)[::-1]
        axes.stairs(falling, np.arange(len(falling) + 1) + 0.5, fill=True, color=ACCENT)
        axes.axhline(falling.mean(), color="black", linestyle="--", linewidth=1, label=f"mean {falling.mean():,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("clusters, largest first")
        axes.set_ylabel("images")
        axes.legend()

    return svg("sizes", draw)


def certainty_histogram(probability: npt.NDArray[np.int64], agreement: npt.NDArray[np.int64]) -> str:
    """Images by agreement and by consensus probability; both are counts in equal bins from 0 to 1."""

    def draw(axes: Any) -> None:
        for counts, color, label in (
            (agreement, ACCENT, "agreement of the heads"),
            (probability, SECOND, "consensus probability"),
        ):
            if counts.sum():
                edges = np.linspace(0, 1, len(counts) + 1)
                axes.stairs(counts, edges, color=color, linewidth=1.5, label=label)
        axes.set_xlabel("agreement, probability")
        axes.set_ylabel("images")
        axes.legend(loc="upper left")

    return svg("certainty", draw)


def svg(name: str, draw: Any, size_inches: tuple[float, float] = SIZE_INCHES) -> str:
    """Draw with `draw(axes)` and return inline SVG; `name` must be unique on the page."""
    # The salt makes ids reproducible, and different from those of other diagrams on the page.
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size_inches, layout="constrained")
        draw(figure.add_subplot())
        sink = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(sink, format="svg", transparent=True, metadata=metadata)
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text)
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("#000000", "currentColor").replace("stroke: #", "stroke:#")
