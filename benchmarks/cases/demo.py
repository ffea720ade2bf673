"""The demo as a user runs it: seconds by stage, and its accuracy against scikit-learn's methods on the same pixels.

Each seed is a whole run of the job on the folder of digits. The images are embedded once, as for any user who changes
the seed.
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
from sklearn.cluster import AgglomerativeClustering, KMeans, SpectralClustering
from sklearn.preprocessing import normalize

from cases import datasets
from icce_ray.metrics.true_label_scores import evaluate_clustering

SETTINGS: dict[str, Any] = {"seeds": [0, 1, 2, 3, 4], "max_seconds": 120}


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    data = datasets.load("digits")
    assert data is not None
    pixels, labels = data[0].astype(np.float32), data[1]
    table: dict[str, list[tuple[float, float, float]]] = {}
    seconds_by_stage: dict[str, float] = {}
    walls = []
    with tempfile.TemporaryDirectory(prefix="icce_ray-demo-") as folder:
        for seed in settings["seeds"]:
            started = time.perf_counter()
            result = run_job(Path(folder), "--set", f"seed={seed}")
            walls.append(time.perf_counter() - started)
            if seed == settings["seeds"][0]:
                seconds_by_stage = result["seconds"]
            metrics = result["metrics"]
            table.setdefault("icce_ray (the demo)", []).append((metrics["acc"], metrics["nmi"], metrics["ari"]))
            print(f"seed {seed}: ACC {metrics['acc']:.4f}, {walls[-1]:.1f} s", flush=True)
    for seed in settings["seeds"]:
        for name, predicted in others(pixels, seed).items():
            scores = evaluate_clustering(labels, predicted)
            table.setdefault(name, []).append((scores["acc"], scores["nmi"], scores["ari"]))
    means = {name: np.mean(rows, axis=0) for name, rows in table.items()}
    print(f"\n| mean of {len(settings['seeds'])} seeds | ACC | NMI | ARI |\n|---|---|---|---|")
    for name, (acc, nmi, ari) in means.items():
        print(f"| {name} | {100 * acc:.1f} | {100 * nmi:.1f} | {100 * ari:.1f} |")
    ours = means.pop("icce_ray (the demo)")
    bounds = {f"mean ACC above {name}": bool(ours[0] > theirs[0]) for name, theirs in means.items()}
    bounds[f"a first run takes under {settings['max_seconds']} s"] = walls[0] < settings["max_seconds"]
    figures = {
        "acc": [row[0] for row in table["icce_ray (the demo)"]],
        "table": {
            name: [round(100 * float(value), 2) for value in np.mean(rows, axis=0)] for name, rows in table.items()
        },
        "first_run_s": walls[0],
        "seconds_by_stage": seconds_by_stage,
    }
    print("seconds by stage:", seconds_by_stage)
    return figures, bounds


def others(pixels: datasets.Floats, seed: int) -> dict[str, Any]:
    """Labels of k-means (L2-normalised, 10 starts), Ward, and spectral clustering on the 20-nearest-neighbour graph."""
    return {
        "k-means": KMeans(10, n_init=10, random_state=seed).fit_predict(normalize(pixels)),
        "Ward": AgglomerativeClustering(10, linkage="ward").fit_predict(normalize(pixels)),
        "spectral": SpectralClustering(
            10, affinity="nearest_neighbors", n_neighbors=20, assign_labels="kmeans", random_state=seed
        ).fit_predict(normalize(pixels)),
    }


def run_job(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the job in `folder`, in a process of its own. Returns its JSON result."""
    command = [sys.executable, "-m", "icce_ray.run", *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
