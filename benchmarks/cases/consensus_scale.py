"""How the time of a consensus grows with the number of images: four times the images in at most 4.4 times the time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from cases.planted import planted_heads
from icce_ray.consensus.ensemble import cluster_ensemble

SETTINGS: dict[str, Any] = {"num_images": 100_000, "num_heads": 50, "num_clusters": 100, "noise": 0.3, "repeats": 3}
FACTOR, MAX_GROWTH = 4, 4.4


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    sizes = [settings["num_images"], FACTOR * settings["num_images"]]
    matrices = [
        planted_heads(size, settings["num_heads"], settings["num_clusters"], settings["noise"])[1] for size in sizes
    ]
    seconds: list[list[float]] = [[], []]
    for _ in range(settings["repeats"]):
        for matrix, times in zip(matrices, seconds, strict=True):
            started = time.perf_counter()
            cluster_ensemble(matrix, settings["num_clusters"], random_state=0)
            times.append(time.perf_counter() - started)
    small, large = (float(np.median(times)) for times in seconds)
    growth = large / small
    print(f"{sizes[0]:,} images: {small:.2f} s; {sizes[1]:,}: {large:.2f} s; {growth:.2f} times as long")
    figures = {"seconds": dict(zip(map(str, sizes), seconds, strict=True)), "growth": growth}
    return figures, {f"{FACTOR} times the images in at most {MAX_GROWTH} times the time": growth <= MAX_GROWTH}
