"""K-means on two shards against faiss.Kmeans with two threads, from the same starts.

The job's iterations are timed from the first to the end of the last, with all that Ray does in between; its start
(actors, rows, starts) is printed beside it. Both sides also assign all images to the final centroids, since both have
to return labels. CPU seconds are those of all processes: on a machine that does other things, trust them rather than
the clock. Memory is that of the shard actors (PSS: what they share counts once) and what the driver gains, in a run of
its own.

For 10 million images and more, operations and bytes are counted, and the time is predicted from the rate measured here.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from cases.neighbors import clustered, write_embed
from cases.process_memory import pss_bytes, worker_processes
from icce_ray.config import Config
from icce_ray.methods.kmeans import job
from icce_ray.methods.kmeans.fit_kmeans import KMeansRun
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import connect
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

SETTINGS: dict[str, Any] = {
    "num_images": 1_000_000,
    "dim": 256,
    "num_clusters": 1000,
    "num_iterations": 10,
    "num_shards": 2,
    "repeats": 2,
    "predicted_images": [100_000_000, 1_000_000_000],
}
ACTOR = b"KMeansShard"
MAX_RATIO = 1.3
MAX_GROWTH = 4.4
MAX_INERTIA_DIFFERENCE = 1e-4
MAX_EXTRA_BYTES = 500_000_000


class Timed(Progress):
    """Notes when the iterations begin and end, and the most memory that the shards held and the driver gained."""

    def __init__(self) -> None:
        super().__init__("kmeans", quiet=True)
        self.peak_bytes = 0
        self.driver_before = pss_bytes(os.getpid(), "Pss_Anon")

    def watch(self, stop: threading.Event) -> None:
        while not stop.wait(0.2):
            shards = sum(map(pss_bytes, worker_processes(ACTOR)))
            driver = pss_bytes(os.getpid(), "Pss_Anon") - self.driver_before
            self.peak_bytes = max(self.peak_bytes, shards + driver)


class Iterations:
    """Wraps the run of one start: its starts, and the seconds and CPU seconds from then on."""

    def __init__(self) -> None:
        self.centroids: Any = None
        self.rows: Any = None
        self.seconds = self.cpu_s = 0.0
        self._lloyd, self._begin = KMeansRun.lloyd_from, KMeansRun.begin

    def __enter__(self) -> Iterations:
        def begin(run: KMeansRun, number: int) -> Any:
            start = self._begin(run, number)
            self.centroids, self.projection = start.centroids_Kd.astype(np.float32), run.projection
            self.began, self.cpu_began = time.perf_counter(), shards_cpu_s()
            return start

        def lloyd(run: KMeansRun, number: int) -> Any:
            start = self._lloyd(run, number)
            self.seconds = time.perf_counter() - self.began
            self.cpu_s = shards_cpu_s() - self.cpu_began
            return start

        KMeansRun.begin, KMeansRun.lloyd_from = begin, lloyd  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        KMeansRun.begin, KMeansRun.lloyd_from = self._begin, self._lloyd  # type: ignore[method-assign]


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    connect(config_of(settings).resources)
    features = clustered(settings["num_images"], settings["dim"])
    quarter = features[: len(features) // 4]
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        embeds = [write_embed(Path(folder) / f"embed{len(rows)}", rows) for rows in (features, quarter)]
        for repeat in range(settings["repeats"]):
            watched = repeat == settings["repeats"] - 1
            iterations, metrics, total_s, peak_bytes = stage(
                embeds[0], Path(folder) / f"out{repeat}", settings, watched
            )
            rows = iterations.projection(features)
            faiss_s, faiss_cpu_s, inertia = faiss_alone(rows, iterations.centroids, settings)
            del rows
            small, _, _, _ = stage(embeds[1], Path(folder) / f"quarter{repeat}", settings, False)
            for name, value in {
                "iterations_s": iterations.seconds,
                "iterations_cpu_s": iterations.cpu_s,
                "start_s": total_s - iterations.seconds,
                "faiss_s": faiss_s,
                "faiss_cpu_s": faiss_cpu_s,
                "quarter_s": small.seconds,
                "quarter_cpu_s": small.cpu_s,
                "inertia": metrics["inertia"],
                "faiss_inertia": inertia,
                "peak_bytes": peak_bytes,
            }.items():
                results.setdefault(name, []).append(value)
            print({name: round(values[-1], 2) for name, values in results.items()}, flush=True)
    ratio = float(np.median(np.divide(results["iterations_s"], results["faiss_s"])))
    cpu_ratio = float(np.median(np.divide(results["iterations_cpu_s"], results["faiss_cpu_s"])))
    growth = float(np.median(np.divide(results["iterations_s"], results["quarter_s"])))
    cpu_growth = float(np.median(np.divide(results["iterations_cpu_s"], results["quarter_cpu_s"])))
    difference = abs(results["inertia"][-1] / results["faiss_inertia"][-1] - 1)
    allowed = 4 * settings["num_images"] * settings["dim"] + MAX_EXTRA_BYTES
    peak_bytes = max(results["peak_bytes"])
    passes = settings["num_iterations"] + 1
    rate = settings["num_images"] * settings["num_clusters"] * passes / float(np.median(results["iterations_cpu_s"]))
    figures = {name: float(np.median(values)) for name, values in results.items()} | {
        "peak_bytes": peak_bytes,
        "allowed_bytes": allowed,
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "growth": growth,
        "cpu_growth": cpu_growth,
        "inertia_difference": difference,
        "pairs_per_cpu_s": rate,
    }
    print(
        f"{ratio:.2f} times faiss.Kmeans ({cpu_ratio:.2f} in CPU seconds); N to 4N: {growth:.2f} times "
        f"({cpu_growth:.2f}); inertia differs by {difference:.1e}; peak {peak_bytes / 1e6:.0f} MB"
    )
    for num_images in settings["predicted_images"]:
        figures[f"{num_images:,} images"] = row = predict(num_images, rate, settings)
        print(f"{num_images:>13,} images: " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()))
    return figures, {
        f"iterations within {MAX_RATIO} times faiss.Kmeans with {settings['num_shards']} threads": ratio <= MAX_RATIO,
        f"inertia equal to {MAX_INERTIA_DIFFERENCE}": difference <= MAX_INERTIA_DIFFERENCE,
        "at most the features + 500 MB of memory": peak_bytes <= allowed,
        f"four times the images cost at most {MAX_GROWTH} times": growth <= MAX_GROWTH,
    }


def predict(num_images: int, pairs_per_cpu_s: float, settings: dict[str, Any]) -> dict[str, float]:
    """Counted and predicted figures of the iterations and the final assignment, on `num_shards` cores."""
    dim, clusters, shards = settings["dim"], settings["num_clusters"], settings["num_shards"]
    passes = settings["num_iterations"] + 1
    return {
        "products": float(num_images) * clusters * dim * passes,
        "hours": num_images * clusters * passes / pairs_per_cpu_s / shards / 3600,
        "TB read": 4.0 * num_images * dim * passes / 1e12,
        "GB of rows on each shard": 4.0 * num_images * dim / shards / 1e9,
        "GB sent": (12.0 * clusters * dim * shards * passes + 4.0 * num_images) / 1e9,
        "GB of labels": 4.0 * num_images / 1e9,
    }


def config_of(settings: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "output": "unused",
            "num_clusters": settings["num_clusters"],
            "embeddings": {"uri": "unused"},
            "method": "kmeans",
            "kmeans": {"num_starts": 1, "num_iterations": settings["num_iterations"], "tolerance": 0.0},
            "resources": {"method": {"num_workers": settings["num_shards"], "cpus_per_worker": 1}},
        }
    )


def stage(
    embed: Artifact, folder: Path, settings: dict[str, Any], watched: bool
) -> tuple[Iterations, dict[str, Any], float, int]:
    """The whole stage: its iterations, metrics, seconds, and peak memory if it is watched."""
    timed, stop = Timed(), threading.Event()
    watcher = threading.Thread(target=timed.watch, args=(stop,))
    if watched:
        watcher.start()
    began = time.perf_counter()
    try:
        with Iterations() as iterations:
            output = ArtifactWriter(Folder.at(folder))
            metrics = job.run(config_of(settings), StageContext(output, {"embed": embed}, timed))
    finally:
        stop.set()
        if watched:
            watcher.join()
    return iterations, metrics, time.perf_counter() - began, timed.peak_bytes


def faiss_alone(rows: Any, centroids: Any, settings: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and inertia of faiss.Kmeans from these centroids, with the final assignment."""
    faiss.omp_set_num_threads(settings["num_shards"])
    kmeans = faiss.Kmeans(
        rows.shape[1], len(centroids), niter=settings["num_iterations"], max_points_per_centroid=len(rows)
    )
    began, cpu_began = time.perf_counter(), time.process_time()
    kmeans.train(rows, init_centroids=centroids)
    distances, _ = kmeans.index.search(rows, 1)
    return time.perf_counter() - began, time.process_time() - cpu_began, float(distances.sum(dtype=np.float64))


def shards_cpu_s() -> float:
    """CPU seconds of all shard actors of this run."""
    stats = (Path(f"/proc/{pid}/stat").read_text() for pid in worker_processes(ACTOR))
    return sum(sum(map(int, stat.rpartition(")")[2].split()[11:13])) for stat in stats) / 100
