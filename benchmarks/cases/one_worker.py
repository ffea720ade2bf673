"""Training with one worker: as an actor, as it is, and by Ray Train, as it is for several. Side by side, in turn.

The digits' pixels, few heads and epochs, so that what is timed is mostly the start. Both ways must give the same heads.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cases import datasets
from cases.job import run_job

SETTINGS: dict[str, Any] = {"rounds": 3, "num_heads": 2, "num_epochs": 2}


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    data = datasets.load("digits")
    assert data is not None
    seconds: dict[bool, list[float]] = {False: [], True: []}
    heads = set()
    with tempfile.TemporaryDirectory(prefix="icce_ray-worker-") as folder:
        np.save(Path(folder) / "features.npy", data[0].astype(np.float32))
        for number in range(settings["rounds"]):
            for with_ray_train in seconds:
                output = Path(folder) / f"{number}-{with_ray_train}"
                result = train(Path(folder), output, with_ray_train, settings)
                seconds[with_ray_train].append(result["seconds"]["heads"])
                (labels,) = output.glob("heads/*/label_matrix.npy")
                heads.add(labels.read_bytes())
                way = "Ray Train" if with_ray_train else "an actor"
                print(f"{way:10} heads {result['seconds']['heads']:6.1f} s", flush=True)
    medians = {way: float(np.median(times)) for way, times in seconds.items()}
    figures = {
        "actor_seconds": medians[False],
        "ray_train_seconds": medians[True],
        "saved_seconds": medians[True] - medians[False],
    }
    return figures, {
        "an actor trains sooner": medians[False] < medians[True],
        "both give the same heads": len(heads) == 1,
    }


def train(folder: Path, output: Path, with_ray_train: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """What the job says."""
    config = {
        "embeddings": {"uri": str(folder / "features.npy")},
        "num_clusters": 10,
        "output": str(output),
        "heads": {"num_heads": settings["num_heads"], "num_epochs": settings["num_epochs"]},
        "resources": {"heads": {"ray_train": with_ray_train}},
    }
    (folder / "run.yaml").write_text(json.dumps(config))
    return run_job(folder, "run.yaml", "--quiet")
