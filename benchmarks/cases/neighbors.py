"""The neighbors stage on two shards against one process that runs faiss's own knn with two threads.

The stage's search is timed from the first query batch to the last part on storage, with all that Ray does in between;
its start (actors, audit) is printed beside it. Memory is that of the shard actors (PSS: what they share counts once),
read in a run of its own: reading it takes a tenth of the CPUs.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from cases.process_memory import pss_bytes, worker_processes
from icce_ray.config import Config
from icce_ray.neighbors import job
from icce_ray.neighbors.search import TORCH_BYTES
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import connect
from icce_ray.sample.unit_features import Floats, prepare
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

SETTINGS: dict[str, Any] = {
    "num_images": 50_000,
    "dim": 256,
    "min_neighbors": 50,
    "mean_neighbors": 200,
    "num_shards": 2,
    "repeats": 3,
}
MAX_RATIO = 1.3
MAX_DOUBLING = 4.4
MAX_EXTRA_BYTES = 500_000_000
ROWS_PER_PART = 8192


class Timed(Progress):
    """Notes when the search begins and ends, and the most memory that the shards held."""

    def __init__(self) -> None:
        super().__init__("neighbors", quiet=True)
        self.began = self.ended = 0.0
        self.peak_bytes = 0

    def update(self, done: int, total: int, note: str = "") -> None:
        self.ended = time.perf_counter()
        self.began = self.began or self.ended

    def watch(self, stop: threading.Event) -> None:
        while not stop.wait(0.2):
            self.peak_bytes = max(self.peak_bytes, sum(map(pss_bytes, worker_processes(b"ShardWorker"))))


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    features = clustered(settings["num_images"], settings["dim"])
    threshold = threshold_for(prepare(features, True)[:], settings["mean_neighbors"])
    half = settings["num_images"] // 2
    half_threshold = threshold_for(prepare(features[:half], True)[:], settings["mean_neighbors"])
    connect(config_of(settings, threshold).resources)
    results: dict[str, list[Any]] = {"faiss_s": [], "search_s": [], "start_s": [], "half_s": []}
    with tempfile.TemporaryDirectory() as folder:
        embed, embed_half = (
            write_embed(Path(folder) / f"embed{len(rows)}", rows) for rows in (features, features[:half])
        )
        timed, metrics, _ = stage(embed, Path(folder) / "watched", config_of(settings, threshold), watched=True)
        peak_bytes = timed.peak_bytes
        for repeat in range(settings["repeats"]):
            results["faiss_s"].append(faiss_alone(features, settings))
            timed, _, total_s = stage(embed, Path(folder) / f"out{repeat}", config_of(settings, threshold))
            search_s = timed.ended - timed.began
            results["search_s"].append(search_s)
            results["start_s"].append(total_s - search_s)
            timed, _, _ = stage(embed_half, Path(folder) / f"half{repeat}", config_of(settings, half_threshold))
            results["half_s"].append(timed.ended - timed.began)
            print({key: round(values[-1], 2) for key, values in results.items()}, flush=True)
    ratio = float(np.median(np.divide(results["search_s"], results["faiss_s"])))
    doubling = float(np.median(np.divide(results["search_s"], results["half_s"])))
    graph_bytes = metrics["num_edges"] * 4 + settings["num_images"] * 8
    allowed = features.shape[0] * features.shape[1] * 4 + graph_bytes + MAX_EXTRA_BYTES
    allowed += settings["num_shards"] * TORCH_BYTES
    figures = {key: float(np.median(values)) for key, values in results.items()} | {
        "peak_bytes": peak_bytes,
        "ratio": ratio,
        "doubling": doubling,
        "allowed_bytes": allowed,
        "mean_neighbors": metrics["mean_neighbors"],
        "share_at_min": metrics["share_at_min"],
    }
    print(f"{ratio:.2f} times faiss's knn; N/2 to N: {doubling:.2f} times; peak {peak_bytes / 1e6:.0f} MB")
    return figures, {
        f"search within {MAX_RATIO} times faiss's own knn with {settings['num_shards']} threads": ratio <= MAX_RATIO,
        f"twice the images cost at most {MAX_DOUBLING} times": doubling <= MAX_DOUBLING,
        "shards hold at most embeddings + result + 500 MB, and torch": peak_bytes <= allowed,
    }


def clustered(num_images: int, dim: int) -> Any:
    """Overlapping Gaussian clusters, (N, D) float16."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((100, dim), dtype=np.float32)
    noise = generator.standard_normal((num_images, dim), dtype=np.float32)
    return (centres[generator.integers(0, 100, num_images)] + 1.5 * noise).astype(np.float16)


def threshold_for(base: Floats, mean_neighbors: int) -> float:
    """The cosine that so many images reach on average."""
    rows = np.random.default_rng(0).choice(len(base), 500, replace=False)
    return round(float(np.quantile(base[rows] @ base.T, 1.0 - (mean_neighbors + 1) / len(base))), 4)


def config_of(settings: dict[str, Any], threshold: float) -> Config:
    return Config.model_validate(
        {
            "output": "unused",
            "num_clusters": 100,
            "embeddings": {"uri": "unused"},
            "neighbors": {"similarity_threshold": threshold, "min_neighbors": settings["min_neighbors"]},
            "resources": {"neighbors": {"num_workers": settings["num_shards"], "cpus_per_worker": 1}},
        }
    )


def write_embed(folder: Path, features: Any) -> Artifact:
    writer = ArtifactWriter(Folder.at(folder))
    for number, start in enumerate(range(0, len(features), ROWS_PER_PART)):
        rows = features[start : start + ROWS_PER_PART]
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
        table = pa.table({"image_id": np.arange(start, start + len(rows)), "embedding": embedding})
        writer.write_table(f"part-{number:05d}.parquet", table)
    return writer.commit(stage="embed", fingerprint=folder.name, inputs={}, config={}, metrics={}, seconds=0.0)


def stage(embed: Artifact, folder: Path, config: Config, watched: bool = False) -> tuple[Timed, dict[str, Any], float]:
    """The whole stage, its metrics, and its seconds. `watched`: its memory is read meanwhile."""
    timed, stop = Timed(), threading.Event()
    watcher = threading.Thread(target=timed.watch, args=(stop,))
    if watched:
        watcher.start()
    started = time.perf_counter()
    try:
        metrics = job.run(config, StageContext(ArtifactWriter(Folder.at(folder)), {"embed": embed}, timed))
    finally:
        stop.set()
        if watched:
            watcher.join()
    return timed, metrics, time.perf_counter() - started


def faiss_alone(features: Any, settings: dict[str, Any]) -> float:
    base = prepare(features, True)[:]
    faiss.omp_set_num_threads(settings["num_shards"])
    started = time.perf_counter()
    faiss.knn(base, base, settings["min_neighbors"] + 1, metric=faiss.METRIC_INNER_PRODUCT)
    return time.perf_counter() - started
