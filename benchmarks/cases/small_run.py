"""CPU seconds of a whole run over a small folder, all its processes together, and of the same command again.

40 digits, by their pixels, with 4 heads: most of it is starting Python and importing.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SETTINGS: dict[str, Any] = {"rounds": 3, "num_images": 40}
HERE = Path(__file__).resolve().parents[2]
MAX_CPU_SECONDS, MAX_CPU_SECONDS_AGAIN = 15.0, 1.0


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    costs, labels = [], set()
    with tempfile.TemporaryDirectory(prefix="icce_ray-small-") as place:
        write_images(Path(place), settings["num_images"])
        for number in range(settings["rounds"]):
            config = write_config(Path(place), str(number))
            (cpu_s, wall_s), (cpu_again_s, _) = run_job(config), run_job(config)
            costs.append([cpu_s, wall_s, cpu_again_s])
            print(f"{cpu_s:6.1f} CPU s, {wall_s:5.1f} s; again {cpu_again_s:5.2f} CPU s", flush=True)
            (found,) = Path(place).glob(f"{number}/consensus/*/labels.npy")
            labels.add(found.read_bytes())
    medians = np.median(costs, axis=0).round(2).tolist()
    figures = dict(zip(("cpu_seconds", "wall_seconds", "cpu_seconds_again"), medians, strict=True))
    return figures, {
        f"below {MAX_CPU_SECONDS:g} CPU seconds": figures["cpu_seconds"] < MAX_CPU_SECONDS,
        f"below {MAX_CPU_SECONDS_AGAIN:g} CPU second again": figures["cpu_seconds_again"] < MAX_CPU_SECONDS_AGAIN,
        "equal labels": len(labels) == 1,
    }


def write_images(folder: Path, num_images: int) -> None:
    digits = load_digits(n_class=4)
    for number, (image, digit) in enumerate(zip(digits.images[:num_images], digits.target, strict=False)):
        path = folder / "images" / str(digit) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(path)


def write_config(folder: Path, name: str) -> Path:
    config = {
        "images": {"uri": str(folder / "images")},
        "num_clusters": 4,
        "output": str(folder / name),
        "embed": {"backbone": "pixels", "image_size": 8, "grayscale": True},
        "heads": {"num_heads": 4, "num_epochs": 5},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))
    return path


def run_job(config: Path) -> tuple[float, float]:
    """Run the job in a process of its own: CPU seconds of it and its children, and wall seconds."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "icce_ray.run", str(config), "--quiet"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, check=False)
    after, wall_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
    if done.returncode:
        raise SystemExit(done.stderr)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall_s
