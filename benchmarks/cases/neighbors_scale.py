"""What the graph of 10 million, 100 million and a billion images costs: operations and bytes counted, time predicted
from rates that are measured here.

Above `sample.max_images` the pipeline builds its graph on a sample; these are the costs of the whole graph. Without a
GPU here, the rate of one is `gpu_pairs_per_s`: by default that measured by `neighbors-gpu` on an H200 for the graph of
1.28 million images of 1,024 dimensions.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from cases.neighbors import clustered, threshold_for
from icce_ray.neighbors.adaptive_rule import Queries, Rule
from icce_ray.neighbors.search import merge, search
from icce_ray.neighbors.torch_engine import TorchEngine
from icce_ray.sample.unit_features import UnitFeatures, prepare

SETTINGS: dict[str, Any] = {
    "num_images": [10_000_000, 100_000_000, 1_000_000_000],
    "num_gpus": [8, 64],
    "dim": 1024,
    "min_neighbors": 50,
    "mean_neighbors": 200,
    "measured_images": 100_000,
    "measured_queries": 4096,
    "gpu_pairs_per_s": 7.9e10,
}
ANSWER_BYTES = 17


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    prepared = prepare(clustered(settings["measured_images"], settings["dim"]), True)
    threshold = threshold_for(prepared[: 1 << 15], settings["mean_neighbors"] * (1 << 15) // len(prepared))
    rule = Rule(threshold, settings["min_neighbors"], 1000, seed=0)
    torch.set_num_threads(1)
    measured = {"cpu core": rate(TorchEngine(prepared, np.arange(len(prepared))), prepared, rule, settings)}
    if torch.cuda.is_available():
        measured["gpu"] = rate(TorchEngine(prepared, np.arange(len(prepared)), "cuda"), prepared, rule, settings)
    gpu_rate = measured.get("gpu", settings["gpu_pairs_per_s"])
    for name, pairs_per_s in measured.items():
        print(f"{name}: {pairs_per_s:.2e} pairs of {settings['dim']} dimensions a second (all pairs counted)")
    if "gpu" not in measured:
        print(f"no GPU here: {gpu_rate:.2e} pairs a second are taken for one")
    figures: dict[str, Any] = {"pairs_per_s": measured}
    for num_images in settings["num_images"]:
        for num_gpus in settings["num_gpus"]:
            figures[f"{num_images:,} images, {num_gpus} GPUs"] = row = predict(num_images, num_gpus, gpu_rate, settings)
            print(f"{num_images:>13,} images, {num_gpus:2} GPUs: " + ", ".join(f"{k} {v:.3g}" for k, v in row.items()))
    return figures, {}


def rate(engine: TorchEngine, prepared: UnitFeatures, rule: Rule, settings: dict[str, Any]) -> float:
    """Pairs of a query and an image per second: the whole search, with the exact second look."""
    ids = np.random.default_rng(0).choice(len(prepared), settings["measured_queries"], replace=False)
    started = time.perf_counter()
    for start in range(0, len(ids), 1024):
        queries = Queries(prepared, ids[start : start + 1024])
        merge([search(engine, queries, rule)], queries, rule)
    return len(ids) * len(prepared) / (time.perf_counter() - started)


def predict(num_images: int, num_gpus: int, pairs_per_s: float, settings: dict[str, Any]) -> dict[str, float]:
    """Counted and predicted figures."""
    dim, pairs = settings["dim"], float(num_images) ** 2
    longest_answer = max(settings["min_neighbors"], settings["mean_neighbors"] / num_gpus)
    return {
        "products": pairs * dim,
        "hours": pairs / (pairs_per_s * num_gpus) / 3600,
        "GB on each GPU": num_images * dim * 6 / num_gpus / 1e9,
        "TB of queries sent": num_images * dim * 2 * num_gpus / 1e12,
        "TB of answers sent": num_images * longest_answer * num_gpus * ANSWER_BYTES / 1e12,
        "TB of graph": num_images * (settings["mean_neighbors"] * 4 + 8) / 1e12,
    }
