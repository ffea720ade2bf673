"""A refit over a collection that has grown: which images keep their cluster's number, and whether a new class is found.

Planted classes; then 1% new images, most of them of a class that was not there. They are assigned first, which offers
new clusters among the outliers; then everything is clustered again with one cluster more. Above `max_images` a sample
is trained on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cases import show_aim
from icce_ray.assign.new_images import assign_images
from icce_ray.config import Config
from icce_ray.images.listing import IDS_PER_SOURCE
from icce_ray.pipeline.run import run_pipeline
from icce_ray.store import Artifact, Folder
from icce_ray.store.run_records import read_records

SETTINGS: dict[str, Any] = {
    "num_images": 10_000,
    "num_clusters": 10,
    "dim": 32,
    "max_images": 4_000,
    "share_of_new": 0.8,
    "method": "kmeans",
}
MIN_KEPT, MIN_FOUND, MIN_SAME_SAMPLE = 0.95, 0.9, 0.95


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    num_images, num_clusters = settings["num_images"], settings["num_clusters"]
    num_added = num_images // 100
    num_new = int(settings["share_of_new"] * num_added)
    rng = np.random.default_rng(0)
    classes = np.concatenate(
        [
            rng.integers(0, num_clusters, num_images),
            np.full(num_new, num_clusters),
            rng.integers(0, num_clusters, num_added - num_new),
        ]
    )
    features = (4 * rng.normal(size=(num_clusters + 1, settings["dim"]))[classes]).astype(np.float32)
    features += rng.normal(size=features.shape).astype(np.float32)
    is_new = classes == num_clusters
    with tempfile.TemporaryDirectory(prefix="icce_ray-refit-") as place:
        folder = Path(place)
        config = {
            "embeddings": {"uri": str(folder / "all.npy")},
            "output": str(folder / "out"),
            "method": settings["method"],
            "sample": {"max_images": settings["max_images"]},
            "classifier": {"num_iterations": 500},
        }
        np.save(folder / "all.npy", features[:num_images])
        first = run_pipeline(Config.model_validate(config | {"num_clusters": num_clusters}), quiet=True)
        before = labels_of(first.assignments)
        np.save(folder / "new.npy", features[num_images:])
        offered = assign_images(folder / "out", embeddings=folder / "new.npy", output=folder / "day", quiet=True)
        new_clusters = pq.read_table(offered.new_clusters)
        np.save(folder / "all.npy", features)
        second = run_pipeline(Config.model_validate(config | {"num_clusters": num_clusters + 1}), quiet=True)
        after = labels_of(second.assignments)
        samples = [trained_on(folder / "out", one.run) for one in (first, second)]
        summary = {record["run"]: record for record in read_records(str(folder / "out"))}[second.run]
        consensus = Artifact.find(Folder.at(folder / "out" / "consensus") / summary["stages"]["consensus"])
        assert consensus is not None
        changes = consensus.metrics["numbers"]
    found = np.bincount(after[is_new], minlength=num_clusters + 1)
    number = int(found.argmax())
    of_new = is_new[num_images:][new_clusters["image_id"].to_numpy() % IDS_PER_SOURCE]
    figures = {
        "kept": float((after[:num_images] == before).mean()),
        "changes": changes,
        "new_class_recall": float(found.max() / num_new),
        "new_class_precision": float(is_new[after == number].mean()),
        "offered_sizes": offered.new_cluster_sizes,
        "offered_recall": float(of_new.sum() / num_new),
        "offered_precision": float(of_new.mean()) if len(of_new) else 0.0,
        "same_sample": float(np.isin(samples[1], samples[0]).mean()),
    }
    for name, value in figures.items():
        print(f"{name:20} {value}", flush=True)
    show_aim("images that keep their cluster's number", "not known", f"{figures['kept']:.1%}", f"{MIN_KEPT:.0%}")
    return figures, {
        f"at least {MIN_KEPT:.0%} of the images keep their number": figures["kept"] >= MIN_KEPT,
        "the new class is a cluster of its own, and named as new": changes["new"] == [number]
        and min(figures["new_class_recall"], figures["new_class_precision"]) >= MIN_FOUND,
        "the new class is offered when its images are assigned": len(offered.new_cluster_sizes) == 1
        and min(figures["offered_recall"], figures["offered_precision"]) >= MIN_FOUND,
        f"at least {MIN_SAME_SAMPLE:.0%} of the sample stays": figures["same_sample"] >= MIN_SAME_SAMPLE,
    }


def labels_of(assignments: str) -> Any:
    return pq.read_table(assignments).sort_by("image_id")["cluster"].to_numpy()


def trained_on(output: Path, run: str) -> Any:
    record = next(record for record in read_records(str(output)) if record["run"] == run)
    return np.load(output / "sample" / record["stages"]["sample"] / "image_ids.npy")
