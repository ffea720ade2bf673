"""The report stage: a page to work in that needs no network and no server, and a contact sheet of the clusters.

The page is ``report.html``; with many images it has a folder ``report_data`` beside it, whose files it loads when they
are needed. Everything on it comes from the artifacts of the run. How it works is in ``web/*.js``.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import yaml

from icce_ray.config import Config
from icce_ray.consensus.hierarchy import HIERARCHY_NAME, Hierarchy
from icce_ray.corrections.stage import applied_corrections, consensus_of, num_clusters_of
from icce_ray.count.stage import CLUSTER_COUNT
from icce_ray.evaluate.run_scores import METRICS_NAME
from icce_ray.images.stage import num_listed
from icce_ray.report.image_columns import ROWS_PER_FILE, write_images
from icce_ray.report.page_content import PageContent, images_per_cluster
from icce_ray.report.page_files import PageFiles, packed
from icce_ray.report.page_plots import page_plots
from icce_ray.report.pictures import (
    SHEET_CELLS,
    SHEET_COLUMNS,
    THUMBNAIL_PIXELS,
    Pixels,
    contact_sheet,
    load_thumbnails,
    may_be_image,
    sheet,
)
from icce_ray.runtime.progress import format_seconds
from icce_ray.sample.training_set import GROUPS_NAME
from icce_ray.stage import StageContext
from icce_ray.store import Artifact

SHEET_NAME = "clusters.png"
EXEMPLARS_ON_SHEET = 12
MAX_ERRORS = 2_000
MAX_GROUPS, MAX_GROUP_IMAGES = 200, 24
"""Groups of near-duplicates on the page, and images of each."""
CONFUSED_PAIRS = 2_000
LABEL_FREE_SCORES = (
    ("estimated_accuracy", "estimated accuracy"),
    ("generalization", "generalisation score"),
    ("silhouette_pca", "silhouette, 50 principal components"),
    ("silhouette_umap", "silhouette, UMAP"),
)
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
"""Metrics of the evaluate stage against true labels, and their names; those before need none."""


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Write report.html, report_data/ unless the page holds everything, and clusters.png if there are pictures. Returns
    num_shown (images on the page), num_pictures, num_bytes of the page itself."""
    inputs, files = context.inputs, PageFiles(context.output)
    assign = inputs["assign"]
    exemplars = assign.read_table("exemplars.parquet")
    groups = _duplicate_groups(inputs)
    wanted = np.unique(np.concatenate([exemplars["image_id"].to_numpy(), *groups])).astype(np.int64)
    content = PageContent(
        (assign.read_table(name) for name in assign.part_names("assignments/")),
        num_clusters_of(config, inputs),
        images_per_cluster(
            np.array([*assign.metrics["cluster_sizes"], assign.metrics.get("num_noise", 0)]), config.report.max_images
        ),
        wanted,
    )
    shown = _in_order(content, exemplars)
    position = dict(zip(shown["image_id"].to_pylist(), range(len(shown)), strict=True))
    map_name, classes = write_images(config, inputs, shown, groups, position, files)

    uris = shown["uri"].to_pylist()
    kept = _exemplars_on_sheet(content, exemplars)
    pictures: dict[str, Pixels] = {}
    num_pictures, has_picture = 0, np.zeros(len(shown), dtype=np.uint8)
    for number, loaded in enumerate(load_thumbnails(uris) if any(map(may_be_image, uris)) else ()):
        start = number * SHEET_CELLS
        if (jpeg := sheet(loaded)) is not None:
            files.add(f"sheet-{number:05d}.jpg", jpeg)
        for place, picture in enumerate(loaded, start):
            if picture is not None:
                has_picture[place] = 1
                if uris[place] in kept:
                    pictures[uris[place]] = picture
        num_pictures = int(has_picture.sum())
        context.progress.update(start + len(loaded), len(uris))

    core = _core(config, inputs, content, shown, position, classes)
    core["images"] |= {"map": map_name, "has_picture": packed(has_picture)}
    core["duplicates"] = [[position[image] for image in group.tolist()] for group in groups]
    num_bytes = files.finish(core)
    _write_contact_sheet(context, content, kept, pictures)
    return {"num_shown": len(shown), "num_pictures": num_pictures, "num_bytes": num_bytes}


def _duplicate_groups(inputs: Mapping[str, Artifact]) -> list[npt.NDArray[np.int64]]:
    """Image ids of groups of near-duplicates, largest first."""
    sample = inputs.get("sample")
    if sample is None or GROUPS_NAME not in sample.part_names():
        return []
    table = sample.read_table(GROUPS_NAME)
    ids, leaders = table["image_id"].to_numpy(), table["leader"].to_numpy()
    starts = np.flatnonzero(np.diff(leaders, prepend=-1))
    groups = np.split(ids, starts[1:]) if len(ids) else []
    largest = sorted(groups, key=lambda group: (-len(group), group[0]))[:MAX_GROUPS]
    return [group[:MAX_GROUP_IMAGES] for group in largest]


def _in_order(content: PageContent, exemplars: pa.Table) -> pa.Table:
    """The images to show with their `rank` among the exemplars: by cluster, largest first, then noise; exemplars
    before others, then by falling agreement."""
    shown = content.shown
    rank_of = dict(zip(exemplars["image_id"].to_pylist(), exemplars["rank"].to_pylist(), strict=True))
    rank_n = np.array([rank_of.get(image, len(rank_of)) for image in shown["image_id"].to_pylist()])
    place_K = np.full(len(content.sizes) + 1, len(content.sizes))  # noise, -1, comes last
    place_K[[row["cluster"] for row in content.clusters()]] = np.arange(len(content.sizes))
    order = np.lexsort((-shown["agreement"].to_numpy(), rank_n, place_K[shown["cluster"].to_numpy()]))
    shown = shown.append_column("rank", pa.array(rank_n))
    return shown.take(pa.array(order)).combine_chunks()


def _exemplars_on_sheet(content: PageContent, exemplars: pa.Table) -> dict[str, int]:
    """URIs of the exemplars for the contact sheet, in its order, and their clusters."""
    place = {row["cluster"]: number for number, row in enumerate(content.clusters())}
    rows = [row for row in exemplars.to_pylist() if row["rank"] < EXEMPLARS_ON_SHEET]
    rows.sort(key=lambda row: (place[row["cluster"]], row["rank"]))
    return {row["uri"]: row["cluster"] for row in rows}


def _write_contact_sheet(
    context: StageContext, content: PageContent, kept: Mapping[str, int], pictures: Mapping[str, Pixels]
) -> None:
    rows: dict[int, list[Pixels]] = {}
    for uri, cluster in kept.items():
        if uri in pictures:
            rows.setdefault(cluster, []).append(pictures[uri])
    png = contact_sheet(
        [(f"cluster {cluster}\n{content.sizes[cluster]:,} images", row) for cluster, row in rows.items()]
    )
    if png is not None:
        context.output.write_bytes(SHEET_NAME, png)


def _core(
    config: Config,
    inputs: Mapping[str, Artifact],
    content: PageContent,
    shown: pa.Table,
    position: Mapping[int, int],
    classes: list[str],
) -> dict[str, Any]:
    """What the page holds from the start."""
    summary = consensus_of(inputs).read_json("summary.json")
    errors = inputs["embed"].read_table("errors.parquet")
    metrics, record = inputs["evaluate"].metrics, inputs["evaluate"].read_json(METRICS_NAME)
    source = ", ".join(config.images.uris) or config.embeddings.uri or ""
    tree = Hierarchy.from_table(consensus_of(inputs).read_table(HIERARCHY_NAME))
    cluster_n = shown["cluster"].to_numpy()
    clusters = content.clusters()
    for row in clusters:
        places = np.flatnonzero(cluster_n == row["cluster"])
        row |= {"first": int(places[0]) if len(places) else 0, "shown": len(places)}
    return {
        "title": config.report.title or f"Clusters of {PurePosixPath(source).name or source}",
        "source": source,
        "output": config.output,
        "page": inputs["assign"].identity,
        "made_for": {
            "consensus": inputs["consensus"].identity,
            "num_clusters": config.num_clusters,
            **({name: inputs[name].fingerprint for name in ("corrections", "assign") if name in inputs}),
        },
        "applied": applied_corrections(inputs),
        "counts": {
            "listed": num_listed(inputs["images"]),
            "assigned": int(content.sizes.sum()) + content.num_noise,
            "errors": errors.num_rows,
            "outliers": int(content.num_outliers.sum()),
            "noise": content.num_noise,
            "shown": len(shown),
        },
        "images": {
            "rows_per_file": ROWS_PER_FILE,
            "thumbnail": THUMBNAIL_PIXELS,
            "sheet_columns": SHEET_COLUMNS,
            "sheet_cells": SHEET_CELLS,
            "labels": classes,
            "clusterings": [row["name"] for row in record["methods"][1:]],
        },
        "scores": {
            "anmi": summary["anmi"],
            "agreement": content.mean_agreement(),
            "estimate": metrics.get("estimated_accuracy"),
            "probability": content.mean_consensus_probability(),
            "label_free": [[label, metrics[key]] for key, label in LABEL_FREE_SCORES if key in metrics],
            "true": [[label, metrics[key]] for key, label in SCORES if key in metrics],
        },
        "clusters": clusters,
        "changes": inputs["consensus"].metrics.get("numbers"),
        "confusion": content.confusion(CONFUSED_PAIRS),
        "tree": {name: getattr(tree, name).tolist() for name in ("left", "right", "similarity", "size")},
        "least_certain": [position[image] for image in content.least_certain],
        "outliers": [position[image] for image in content.outliers],
        "errors": [[row["image_id"], row["uri"], row["reason"]] for row in errors.slice(0, MAX_ERRORS).to_pylist()],
        "methods": {"rows": record["methods"], "nmi": record["method_nmi"]},
        "plots": page_plots(content, inputs),
        "choice": inputs[CLUSTER_COUNT.name].metrics["choice"] if CLUSTER_COUNT.name in inputs else None,
        "run": {
            "consensus": [[name, anmi] for name, anmi in summary["anmi_by_method"].items()],
            "chosen": summary["method"],
            "skipped": list(summary.get("skipped", {}).items()),
            "classifier": {
                name: inputs["classifier"].metrics[name]
                for name in ("learning_rate", "holdout_agreement", "num_holdout", "ece")
            },
            "seconds": [[name, format_seconds(artifact.manifest.seconds)] for name, artifact in inputs.items()],
            "total": format_seconds(sum(artifact.manifest.seconds for artifact in inputs.values())),
            "settings": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
            "libraries": list(inputs["assign"].manifest.libraries.items()),
        },
    }
