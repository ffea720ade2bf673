"""Memory of the whole embedding job (driver, Ray's own processes, workers) for few images and for ten times as many.

It is the proportional set size of the process tree: a page that several processes share, such as one of Ray's object
store, counts once. Images and results are on the local disk, whose cache belongs to no process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cases.process_memory import MemoryWatch

SETTINGS: dict[str, Any] = {"num_images": [2000, 20_000], "image_size": 64, "max_ratio": 1.2, "repeats": 1}
JOB = """
import sys
from icce_ray.pipeline import run as pipeline
from icce_ray.config import load_config
config, artifacts = load_config(sys.argv[1]), {}
for step in pipeline.plan(config)[:2]:
    artifacts[step.name] = pipeline.run_stage(config, step, artifacts, True)
assert artifacts["embed"].metrics["num_images"] == int(sys.argv[2])
"""


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    peaks: dict[int, list[float]] = {count: [] for count in settings["num_images"]}
    seconds: dict[int, list[float]] = {count: [] for count in settings["num_images"]}
    with tempfile.TemporaryDirectory(prefix="icce_ray-memory-") as folder:
        for count in peaks:
            write_images(Path(folder) / str(count), count)
        for repeat in range(settings["repeats"]):
            for count in peaks:
                started = time.perf_counter()
                peak = run_job(Path(folder), count, settings["image_size"], repeat)
                peaks[count].append(peak)
                seconds[count].append(time.perf_counter() - started)
                print(f"{count:>7,} images: peak {peak / 2**20:,.0f} MiB, {seconds[count][-1]:.1f} s", flush=True)
    few, many = (float(np.median(peaks[count])) for count in peaks)
    figures = {
        "peak_bytes": {str(count): values for count, values in peaks.items()},
        "seconds": {str(count): values for count, values in seconds.items()},
        "ratio": many / few,
    }
    return figures, {f"ratio of the peaks below {settings['max_ratio']}": many / few < settings["max_ratio"]}


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.jpg")


def run_job(folder: Path, count: int, image_size: int, repeat: int) -> float:
    """Peak memory of the job in bytes."""
    config = folder / f"{count}-{repeat}.yaml"
    settings = {
        "images": {"uri": str(folder / str(count))},
        "output": str(folder / f"out-{count}-{repeat}"),
        "num_clusters": 2,
        "embed": {"backbone": "pixels", "image_size": image_size},
        "resources": {"object_store_bytes": 200_000_000},
    }
    config.write_text(json.dumps(settings))
    with (
        subprocess.Popen([sys.executable, "-c", JOB, str(config), str(count)]) as job,
        MemoryWatch(job.pid) as memory,
    ):
        assert job.wait() == 0
    return memory.peak()
