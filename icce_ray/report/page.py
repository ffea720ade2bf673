"""The report stage: one HTML page that needs no network, and a contact sheet of the clusters."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import jinja2
import yaml

from icce_ray.config import Config
from icce_ray.consensus.hierarchy import HIERARCHY_NAME, Hierarchy
from icce_ray.count.stage import CLUSTER_COUNT
from icce_ray.images.stage import num_listed
from icce_ray.methods.clusterings import read_history
from icce_ray.report.page_content import PageContent
from icce_ray.report.pictures import Pixels, contact_sheet, data_uri, load_thumbnails
from icce_ray.report.plots import (
    certainty_histogram,
    cluster_count_curve,
    merge_tree,
    neighbors_by_threshold,
    similarity_histogram,
    size_chart,
    training_curve,
)
from icce_ray.runtime.progress import format_seconds
from icce_ray.stage import StageContext
from icce_ray.store import Artifact

PAGE_NAME = "report.html"
SHEET_NAME = "clusters.png"
NUM_LEAST_CERTAIN = 36
MAX_OUTLIERS = 36
MAX_ERRORS = 100
SCORES = (
    ("acc", "ACC"),
    ("nmi", "NMI (geometric)"),
    ("nmi_arithmetic", "NMI (arithmetic)"),
    ("ari", "ARI"),
    ("many_to_one", "many-to-one"),
    ("head_acc_mean", "ACC, mean head"),
    ("head_acc_lowest_loss", "ACC, lowest-loss head"),
    ("head_acc_best", "ACC, best head"),
    ("acc_high_agreement", "ACC, upper half by agreement"),
    ("acc_low_agreement", "ACC, lower half by agreement"),
)
"""Metrics of the evaluate stage and their labels."""
COUNT_PLOTS = (
    (("score", "score"), ("stability", "stability")),
    (("silhouette", "silhouette"), ("generalization", "generalisation score")),
)
"""The two columns of by_count.parquet in each diagram, and their labels."""


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Write report.html, and clusters.png if there are pictures.

    Returns:
        num_pictures and num_bytes of the page.
    """
    assign = context.inputs["assign"]
    content = PageContent(
        (assign.read_table(name) for name in assign.part_names("assignments/")),
        config.num_clusters,
        num_least_certain=NUM_LEAST_CERTAIN,
        max_outliers=MAX_OUTLIERS,
    )
    exemplars: dict[int, list[str]] = {
        row["cluster"]: [] for row in content.clusters()[: config.report.max_clusters] if row["size"]
    }
    for row in assign.read_table("exemplars.parquet").to_pylist():
        if row["cluster"] in exemplars and row["rank"] < config.report.images_per_cluster:
            exemplars[row["cluster"]].append(row["uri"])
    shown = [image.uri for image in (*content.least_certain, *content.outliers)]
    pictures = load_thumbnails(
        shown + [uri for uris in exemplars.values() for uri in uris],
        lambda done, total: context.progress.update(done, total, "pictures"),
    )
    page = render(config, context.inputs, content, exemplars, pictures).encode("utf-8", errors="replace")
    context.output.write_bytes(PAGE_NAME, page)
    sheet = contact_sheet(
        [
            (
                f"cluster {cluster}\n{content.sizes[cluster]:,} images",
                [pictures[uri] for uri in uris if uri in pictures],
            )
            for cluster, uris in exemplars.items()
        ]
    )
    if sheet is not None:
        context.output.write_bytes(SHEET_NAME, sheet)
    return {"num_pictures": len(pictures), "num_bytes": len(page)}


def render(
    config: Config,
    inputs: Mapping[str, Artifact],
    content: PageContent,
    exemplars: dict[int, list[str]],
    pictures: dict[str, Pixels],
) -> str:
    """The page as HTML.

    Args:
        exemplars: URIs to show by cluster.
        pictures: by URI.
    """
    summary = inputs["consensus"].read_json("summary.json")
    errors = inputs["embed"].read_table("errors.parquet")
    history = read_history(inputs["method"])
    metrics = inputs["evaluate"].metrics
    # Not every method has a graph.
    audit = inputs["neighbors"].read_json("audit.json") if "neighbors" in inputs else None
    source = ", ".join(config.images.uris) or config.embeddings.uri or ""
    tree = Hierarchy.from_table(inputs["consensus"].read_table(HIERARCHY_NAME))
    plots = [
        ("Cluster sizes", size_chart(content.sizes)),
        ("Confidence and agreement", certainty_histogram(content.confidence_bins, content.agreement_bins)),
        ("Similarity of images", audit and similarity_histogram(audit)),
        ("Neighbours by threshold", audit and neighbors_by_threshold(audit)),
        ("Training", training_curve(history)),
        ("Hierarchy of clusters", merge_tree(tree)),
    ]
    choice, count_plots = None, list[tuple[str, str]]()
    if CLUSTER_COUNT.name in inputs:
        choice = inputs[CLUSTER_COUNT.name].metrics["choice"]
        rows = inputs[CLUSTER_COUNT.name].read_table("by_count.parquet").to_pylist()
        count_plots = [
            (f"{left[1].capitalize()} and {right[1]}", cluster_count_curve(rows, (left, right), f"count-{left[0]}"))
            for left, right in COUNT_PLOTS
        ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "name": _name}
    template = importlib.resources.files("icce_ray.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=config.report.title or f"Clusters of {PurePosixPath(source).name or source}",
        source=source,
        num_listed=num_listed(inputs["images"]),
        num_errors=errors.num_rows,
        errors=errors.slice(0, MAX_ERRORS).to_pylist(),
        num_clusters=config.num_clusters,
        choice=choice,
        count_plots=count_plots,
        num_outliers=int(content.num_outliers.sum()),
        num_noise=content.num_noise,
        summary=summary,
        mean_agreement=content.mean_agreement(),
        mean_confidence=content.mean_confidence(),
        scores=[(label, metrics[key]) for key, label in SCORES if key in metrics],
        classifier=inputs["classifier"].metrics,
        clusters=content.clusters(),
        confused={row["cluster"]: row["confused_with"] for row in summary.get("clusters", [])},
        exemplars=exemplars,
        least_certain=content.least_certain,
        outliers=content.outliers,
        pictures={uri: data_uri(picture) for uri, picture in pictures.items()},
        plots=[(heading, svg) for heading, svg in plots if svg],
        seconds=[(name, format_seconds(artifact.manifest.seconds)) for name, artifact in inputs.items()],
        total=format_seconds(sum(artifact.manifest.seconds for artifact in inputs.values())),
        settings=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        libraries=inputs["assign"].manifest.libraries,
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _name(uri: str) -> str:
    """The last folder and the file name of a URI."""
    return "/".join(uri.rsplit("/", 2)[-2:])
