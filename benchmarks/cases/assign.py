"""``icce-ray assign --embeddings`` against a bare torch matmul over the same Parquet files, at ImageNet's size.

The bare loop reads each file in batches, casts them to float32 and multiplies them by a D x K matrix on all cores. The
command does this and everything else: calibrated confidence, second choice, outlier score, exemplars, drift, checksums
and the Parquet parts. Both read the same file under several names, which costs as much as several files: after the
first reading, files are in the page cache.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from icce_ray import assign_images
from icce_ray.classifier.linear import DESCRIPTION_NAME, MODEL_NAME, NUM_PROBABILITY_BINS, LinearClassifier
from icce_ray.classifier.outliers import OutlierModel
from icce_ray.config import Config
from icce_ray.runtime.machine import usable_cpus
from icce_ray.runtime.ray_cluster import connect
from icce_ray.store import ArtifactWriter, Folder

SETTINGS: dict[str, Any] = {
    "rows_per_file": 65_536,
    "num_files": 12,
    "dim": 2048,
    "num_clusters": 1000,
    "repeats": 3,
    "num_workers": None,
}
BATCH_ROWS = 8_192
ROW_GROUP_ROWS = 16_384
MIN_RATIO = 0.7


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    num_rows = settings["rows_per_file"] * settings["num_files"]
    num_workers = settings["num_workers"] or usable_cpus()
    with tempfile.TemporaryDirectory(prefix="icce_ray-assign-") as root:
        place = Path(root)
        files = write_embeddings(place / "embeddings", settings)
        config = Config.model_validate(
            {"embeddings": {"uri": str(files[0].parent)}, "num_clusters": settings["num_clusters"], "output": root}
        )
        classifier = random_classifier(settings["dim"], settings["num_clusters"])
        model = write_model(place / "model", classifier, config)
        connect(config.resources)
        overrides = [f"resources.assign.num_workers={num_workers}"]
        seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        for round_ in range(settings["repeats"]):
            started = time.perf_counter()
            bare_matmul(files, torch.from_numpy(classifier.weights))
            seconds["bare"].append(time.perf_counter() - started)
            started = time.perf_counter()
            output = place / f"out-{round_}"
            result = assign_images(model, embeddings=files[0].parent, output=output, overrides=overrides, quiet=True)
            seconds["ours"].append(time.perf_counter() - started)
            assert result.num_images == num_rows
            print(f"rows/s: ours {num_rows / seconds['ours'][-1]:,.0f}, bare {num_rows / seconds['bare'][-1]:,.0f}")
    ratios = [bare / ours for ours, bare in zip(seconds["ours"], seconds["bare"], strict=True)]
    figures = {
        "num_rows": num_rows,
        "num_workers": num_workers,
        "rows_per_s": num_rows / float(np.median(seconds["ours"])),
        "bare_rows_per_s": num_rows / float(np.median(seconds["bare"])),
        "ratio": float(np.median(ratios)),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    return figures, {f"at least {MIN_RATIO} of the bare matmul's rows/s": figures["ratio"] >= MIN_RATIO}


def bare_matmul(files: list[Path], weights_DK: torch.Tensor) -> int:
    """Read all rows, multiply them by the weights and take the most probable cluster. Returns the number of rows."""
    num_rows = 0
    torch.set_num_threads(usable_cpus())
    with torch.inference_mode():
        for path in files:
            for batch in pq.ParquetFile(path).iter_batches(BATCH_ROWS):
                values = batch.column(0).flatten().to_numpy(zero_copy_only=True)
                x = torch.from_numpy(values.reshape(batch.num_rows, -1)).float()
                num_rows += len((x @ weights_DK).argmax(1))
    return num_rows


def write_embeddings(folder: Path, settings: dict[str, Any]) -> list[Path]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((settings["rows_per_file"], settings["dim"]), dtype=np.float32).astype(np.float16)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), settings["dim"])
    files = [folder / f"{index:03d}.parquet" for index in range(settings["num_files"])]
    pq.write_table(pa.table({"embedding": lists}), files[0], compression="zstd", row_group_size=ROW_GROUP_ROWS)
    for path in files[1:]:
        os.link(files[0], path)
    return files


def random_classifier(dim: int, num_clusters: int) -> LinearClassifier:
    """A classifier of the size of a trained one, which takes as much work."""
    rng = np.random.default_rng(1)
    num_directions = 128
    directions, _ = np.linalg.qr(rng.normal(size=(dim, num_directions)))
    return LinearClassifier(
        mean=np.zeros(dim, dtype=np.float32),
        scale=1.0,
        weights=(rng.standard_normal((dim, num_clusters)) / np.sqrt(dim)).astype(np.float32),
        bias=np.zeros(num_clusters, dtype=np.float32),
        temperature=0.5,
        probability_floor=0.01,
        outliers=OutlierModel(
            directions=directions.astype(np.float32),
            deviations=np.ones(num_directions, dtype=np.float32),
            cluster_means=np.zeros((num_clusters, dim), dtype=np.float32),
            noise_variance=1.0,
        ),
        outlier_threshold=1.2,
        cluster_sizes=np.full(num_clusters, 1281, dtype=np.int64),
        learning_rate=0.1,
        num_diverged=0,
        num_holdout=1,
        holdout_agreement=1.0,
        ece=0.0,
        holdout_probability=np.ones(NUM_PROBABILITY_BINS, dtype=np.int64),
        holdout_mean_probability=0.5,
        holdout_outlier_rate=0.001,
    )


def write_model(folder: Path, classifier: LinearClassifier, config: Config) -> Path:
    writer = ArtifactWriter(Folder.at(folder))
    writer.write_bytes(MODEL_NAME, classifier.to_bytes())
    description = {"num_clusters": classifier.num_clusters, "num_dims": classifier.num_dims, "seed": config.seed}
    writer.write_json(DESCRIPTION_NAME, description)
    writer.commit(
        stage="classifier",
        fingerprint="benchmark",
        inputs={},
        config=config.model_dump(mode="json"),
        metrics={},
        seconds=0.0,
    )
    return folder
