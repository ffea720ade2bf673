"""A run of TURTLE against a plain transcription of the paper in PyTorch: seconds a step, and accuracy after as many.

Both have the paper's constants; a few of the 6,000 steps are timed.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from cases.plain_turtle import PlainTurtle
from icce_ray.config import TurtleConfig
from icce_ray.methods.turtle.feature_scaling import prepare_features
from icce_ray.methods.turtle.turtle_run import TurtleRun
from icce_ray.metrics.true_label_scores import clustering_accuracy
from icce_ray.runtime.machine import matmul_dtype
from icce_ray.runtime.threads import ThreadPool

SETTINGS: dict[str, Any] = {
    "num_images": 10_000,
    "dim": 1280,
    "num_clusters": 10,
    "timed_steps": 5,
    "repeats": 4,
    "accuracy_steps": 100,
    "seeds": [0, 1],
}
PAPER = TurtleConfig(scale_features=False, num_steps=6000)
MAX_SHARE = 1 / 3
MAX_ACCURACY_LOSS = 0.01


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    features_ND, labels_N = planted(settings["num_images"], settings["dim"], settings["num_clusters"])
    device = torch.device("cpu")
    with ThreadPool(torch.get_num_threads()) as pool:
        dtype = matmul_dtype("auto", device)
        space = prepare_features(features_ND, scale=False, seed=0, dtype=dtype, device=device, pool=pool)
        figures: dict[str, Any] = {"threads": torch.get_num_threads(), "dtype": str(dtype)}
        ours, plain = [], []
        for number, seed in enumerate(settings["seeds"]):
            mine = TurtleRun([space], PAPER, num_clusters=settings["num_clusters"], seed=seed, run=0, pool=pool)
            theirs = PlainTurtle(
                features_ND,
                settings["num_clusters"],
                PAPER.batch_size,
                *(part.clone() for part in mine.encoder.layers[0]),
            )
            if number == 0:
                figures |= compare_speed(mine, theirs, settings["timed_steps"], settings["repeats"])
            for _ in range(settings["accuracy_steps"] - mine.step):
                mine.train_step()
                theirs.step()
            ours.append(clustering_accuracy(labels_N, mine.labels()))
            plain.append(clustering_accuracy(labels_N, theirs.labels()))
            print(
                f"seed {seed}, {settings['accuracy_steps']} steps: ACC {ours[-1]:.4f}, plain {plain[-1]:.4f}",
                flush=True,
            )
    figures |= {"accuracy": float(np.mean(ours)), "plain_accuracy": float(np.mean(plain))}
    bounds = {
        "at most a third of the time of the plain transcription": figures["share"] <= MAX_SHARE,
        f"accuracy within {MAX_ACCURACY_LOSS} of the plain transcription's": (
            figures["accuracy"] >= figures["plain_accuracy"] - MAX_ACCURACY_LOSS
        ),
    }
    return figures, bounds


def planted(num_images: int, dim: int, num_clusters: int) -> tuple[Any, Any]:
    """Overlapping Gaussian clusters."""
    generator = np.random.default_rng(0)
    labels_N = generator.integers(0, num_clusters, num_images)
    centres = generator.normal(size=(num_clusters, dim)).astype(np.float32) * np.float32(4.0 / np.sqrt(dim))
    return centres[labels_N] + generator.standard_normal((num_images, dim), dtype=np.float32), labels_N


def compare_speed(mine: TurtleRun, theirs: PlainTurtle, num_steps: int, repeats: int) -> dict[str, Any]:
    """Both in turn, several times; the medians. The first round warms up."""
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(repeats + 1):
        for name, step in (("ours", mine.train_step), ("plain", theirs.step)):
            started = time.perf_counter()
            for _ in range(num_steps):
                step()
            seconds[name].append((time.perf_counter() - started) / num_steps)
    step_s, plain_step_s = (float(np.median(values[1:])) for values in (seconds["ours"], seconds["plain"]))
    share = float(np.median([a / b for a, b in zip(seconds["ours"][1:], seconds["plain"][1:], strict=True)]))
    print(
        f"a step takes {step_s * 1e3:.1f} ms, plain {plain_step_s * 1e3:.1f} ms: {share:.2f} of the time; "
        f"{PAPER.num_steps:,} steps {PAPER.num_steps * step_s:.0f} s, plain {PAPER.num_steps * plain_step_s:.0f} s",
        flush=True,
    )
    return {"step_s": step_s, "plain_step_s": plain_step_s, "share": share}
