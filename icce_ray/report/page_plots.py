"""The diagrams of the page, as inline SVG by heading."""

from __future__ import annotations

from collections.abc import Mapping

from icce_ray.consensus.hierarchy import Hierarchy
from icce_ray.count.stage import CLUSTER_COUNT
from icce_ray.methods.clusterings import read_history
from icce_ray.report.page_content import PageContent
from icce_ray.report.plots import (
    certainty_histogram,
    cluster_count_curve,
    merge_tree,
    neighbors_by_threshold,
    similarity_histogram,
    size_chart,
    training_curve,
)
from icce_ray.store import Artifact

COUNT_PLOTS = (
    (("score", "score"), ("stability", "stability")),
    (("silhouette", "silhouette"), ("generalization", "generalisation score")),
)
"""The two columns of by_count.parquet in each diagram, and their labels."""


def draw_plots(content: PageContent, inputs: Mapping[str, Artifact], tree: Hierarchy) -> list[tuple[str, str]]:
    """Heading and SVG of each diagram that this run has data for."""
    plots = [
        ("Cluster sizes", size_chart(content.sizes)),
        ("Agreement and consensus probability", certainty_histogram(content.probability_bins, content.agreement_bins)),
        ("Training", training_curve(read_history(inputs["method"]))),
        ("Hierarchy of clusters", merge_tree(tree)),
    ]
    if "neighbors" in inputs:
        audit = inputs["neighbors"].read_json("audit.json")
        plots[2:2] = [
            ("Similarity of images", similarity_histogram(audit)),
            ("Neighbours by threshold", neighbors_by_threshold(audit)),
        ]
    if CLUSTER_COUNT.name in inputs:
        rows = inputs[CLUSTER_COUNT.name].read_table("by_count.parquet").to_pylist()
        plots += [
            (f"{left[1].capitalize()} and {right[1]}", cluster_count_curve(rows, (left, right), f"count-{left[0]}"))
            for left, right in COUNT_PLOTS
        ]
    return [(heading, svg) for heading, svg in plots if svg is not None]
