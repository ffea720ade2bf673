"""A finished run on planted images, without Ray: every artifact that the report reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from icce_ray.assign.embeddings_to_label import EmbeddedImages
from icce_ray.assign.exemplars import choose_exemplars
from icce_ray.assign.part_labeler import PartLabeler
from icce_ray.classifier.linear import MODEL_NAME
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import ClassifierConfig, Config
from icce_ray.consensus.hierarchy import HIERARCHY_NAME, merge_clusters
from icce_ray.embed.embedding_parts import part_table, plan_parts
from icce_ray.images import list_images
from icce_ray.images.listing import Listing
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

COLORS = {"red": (200, 40, 30), "green <b>&": (40, 190, 60), "blue": (30, 60, 210)}
PER_CLASS = 30


@dataclass(frozen=True)
class PlantedRun:
    config: Config
    inputs: dict[str, Artifact]

    def context(self, folder: Path) -> StageContext:
        return StageContext(ArtifactWriter(Folder.at(folder)), self.inputs, Progress("report", quiet=True))


def commit(writer: ArtifactWriter, stage: str, config: Config, metrics: dict[str, Any] | None = None) -> Artifact:
    return writer.commit(
        stage=stage,
        fingerprint=f"{stage}-0",
        inputs={},
        config=config.model_dump(mode="json"),
        metrics=metrics or {},
        seconds=1.5,
    )


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            pixels = np.clip(np.array(color) + rng.normal(0, 25, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02d} 'x' <i>.png")


@pytest.fixture(scope="session")
def planted_run(tmp_path_factory: pytest.TempPathFactory) -> PlantedRun:
    return build_run_of_images(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="session")
def make_run() -> Callable[..., PlantedRun]:
    return build_run


@pytest.fixture(scope="session")
def combined_run(tmp_path_factory: pytest.TempPathFactory) -> PlantedRun:
    """Two methods combined, with seven images as noise."""
    return build_run_of_images(tmp_path_factory.mktemp("combined"), num_noise=7)


def build_run_of_images(folder: Path, num_noise: int = 0) -> PlantedRun:
    write_images(folder / "images")
    config = Config.model_validate(
        {"images": {"uri": str(folder / "images")}, "num_clusters": 4, "output": str(folder / "out")}
    )
    return build_run(config, folder / "out", rows_per_part=32, num_noise=num_noise)


def build_run(config: Config, root: Path, rows_per_part: int, num_noise: int = 0) -> PlantedRun:
    inputs: dict[str, Artifact] = {}

    def writer(stage: str) -> ArtifactWriter:
        return ArtifactWriter(Folder.at(root / stage))

    output = writer("images")
    list_images.run(config, StageContext(output, {}, Progress("images", quiet=True)))
    inputs["images"] = commit(output, "images", config)
    table = Listing(inputs["images"]).table(0, 1000)

    uris = table["uri"].to_pylist()
    failed = len(uris) - 1
    rows = np.array([row for row in range(len(uris)) if row != failed])
    features = np.random.default_rng(1).normal(0, 0.3, (len(uris), 6)).astype(np.float32)
    classes = np.minimum(np.arange(len(uris)) * 3 // len(uris), 2)
    features[np.arange(len(uris)), classes] += 3
    features[7] += 200
    output = writer("embed")
    for part in plan_parts(len(uris), rows_per_part):
        inside = rows[(rows >= part.start) & (rows < part.stop)]
        output.write_table(part.file_name, part_table(inside, features[inside]))
    output.write_table(
        "errors.parquet", pa.table({"image_id": [failed], "uri": [uris[failed]], "reason": ["truncated"]})
    )
    inputs["embed"] = commit(output, "embed", config, {"feature_set": "planted"})

    output = writer("neighbors")
    counts = [0, 3, 40, 9, 0, 1]
    audit = {"similarity_threshold": 0.4, "bin_edges": [-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0]}
    audit["thresholds"] = [
        {"threshold": tenth / 10, "mean_neighbors": 1000 / (tenth + 1), "estimated_precision": tenth / 10}
        for tenth in range(10)
    ]
    output.write_json("audit.json", audit | {"random_pairs": counts, "nearest_pairs": counts[::-1]})
    inputs["neighbors"] = commit(output, "neighbors", config)

    labels = classes[rows].astype(np.int32)
    labels[:3] = 1
    labels[40 : 40 + num_noise] = -1
    agreement = np.where(labels < 0, np.nan, 0.9).astype(np.float32)
    agreement[:3] = 0.2
    output = writer("method")
    output.write_array("label_matrix.npy", np.stack([labels, np.roll(labels, 5)]))
    history = [{"epoch": epoch, "loss": 3 / epoch, "best_head_loss": 2.5 / epoch} for epoch in range(1, 9)]
    output.write_json("clusterings.json", {"history": history, "losses": [0.3, 0.4]})
    inputs["method"] = commit(output, "heads", config)

    output = writer("consensus")
    output.write_array("labels.npy", labels)
    output.write_array("agreement.npy", agreement)
    confused = [{"cluster": 0, "size": 30, "mean_agreement": 0.9, "confused_with": [{"cluster": 1, "share": 0.25}]}]
    summary = {"method": "mcla", "anmi": 0.8123, "anmi_by_method": {"mcla": 0.8123, "hbgf": 0.7}, "clusters": confused}
    summary |= {"skipped": {"cspa": "it compares all pairs of images, and 6,000 images are over the limit of 5,000"}}
    output.write_json("summary.json", summary)
    together = np.array([[1.0, 0.4, 0.1, 0.0], [0.4, 1.0, 0.2, 0.0], [0.1, 0.2, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    tree = merge_clusters(together, np.bincount(labels[labels >= 0], minlength=4))
    output.write_table(HIERARCHY_NAME, tree.to_table())
    numbers = {
        "run": "before",
        "num_kept": 2,
        "new": [0],
        "split": [],
        "merged": [[5, 1]],
        "gone": [6],
        "renumbered": [],
    }
    inputs["consensus"] = commit(output, "consensus", config, {"anmi": 0.8123, "numbers": numbers})

    classifier = fit_classifier(
        features[rows],
        labels,
        ClassifierConfig(num_iterations=200),
        num_clusters=config.num_clusters,
        seed=0,
        outlier_quantile=0.98,
    )
    output = writer("classifier")
    output.write_bytes(MODEL_NAME, classifier.to_bytes())
    figures = {"learning_rate": 0.01, "holdout_agreement": 0.99, "num_holdout": 9, "ece": 0.02}
    inputs["classifier"] = commit(output, "classifier", config, figures)

    output = writer("assign")
    labeler = PartLabeler(
        EmbeddedImages(inputs["embed"], inputs["images"]), output.folder, inputs, num_exemplars=16, seed=0
    )
    (part,) = labeler.source.plan()
    (assignments, candidates), totals = labeler.label(part)
    output.add(assignments)
    candidates_table = pq.read_table(root / "assign" / candidates.name)
    output.write_table("exemplars.parquet", choose_exemplars(candidates_table, 16))
    inputs["assign"] = commit(output, "assign", config, totals.metrics())
    output = writer("evaluate")
    methods = [
        {"name": name, "num_clusters": 3, "num_noise": num_noise, "generalization": 0.9, "silhouette_pca": None}
        for name in (("consensus", "icce", "<b>hdbscan") if num_noise else ())
    ]
    nmi = np.full((len(methods), len(methods)), 0.75) + 0.25 * np.eye(len(methods))
    output.write_json("metrics.json", {"methods": methods, "method_nmi": nmi.tolist()})
    if methods:
        output.write_array("method_clusterings.npy", np.stack([np.maximum(labels, 0), labels]))
    ids_n = np.arange(len(rows))
    names = pa.array(sorted(COLORS)).take(pa.array(classes[rows])).dictionary_encode()
    output.write_table("labels.parquet", pa.table({"image_id": ids_n, "label": names}))
    inputs["evaluate"] = commit(
        output,
        "evaluate",
        config,
        {"estimated_accuracy": 0.87, "generalization": 0.9, "acc": 0.9111, "nmi": 0.8, "ari": 0.7},
    )
    return PlantedRun(config, inputs)
