"""A run of TURTLE against a plain transcription of the paper in PyTorch: seconds a step, and accuracy after as many.

Both have the paper's constants; a few of the 6,000 steps are timed. For the accuracy both make the same draws, so ours
differs by the rounding of bfloat16 only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cases.plain_turtle import PlainTurtle
from icce_ray.config import TurtleConfig
from icce_ray.methods.turtle.feature_scaling import label_rows, prepare_features
from icce_ray.methods.turtle.run_block import RunBlock, run_blocks
from icce_ray.metrics.true_label_scores import clustering_accuracy
from icce_ray.runtime.machine import matmul_dtype
from icce_ray.runtime.threads import ThreadPool

SETTINGS: dict[str, Any] = {
    "num_images": 10_000,
    "dim": 1280,
    "num_clusters": 10,
    "num_runs": 5,
    "timed_steps": 5,
    "repeats": 4,
    "accuracy_steps": 100,
    "accuracy_runs": [0, 1],
}
PAPER = TurtleConfig(scale_features=False, num_steps=6000)
MAX_SHARE = 1 / 3
MAX_ACCURACY_LOSS = 0.01


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    num_clusters = settings["num_clusters"]
    features_ND, labels_N = planted(settings["num_images"], settings["dim"], num_clusters)
    device, dtype = torch.device("cpu"), matmul_dtype("auto", torch.device("cpu"))
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "dtype": str(dtype)}
    bounds: dict[str, bool] = {}
    with ThreadPool(torch.get_num_threads()) as pool:
        space = prepare_features(features_ND, scale=False, seed=0, dtype=dtype, device=device, pool=pool)

        def block_of(runs: Sequence[int]) -> RunBlock:
            return RunBlock([space], PAPER, runs, num_clusters=num_clusters, seed=0, pool=pool)

        def plain_of(block: RunBlock) -> PlainTurtle:
            """A plain run with the initial layer of the block's first run."""
            layer_EK = block.encoder.layers[0][:, :num_clusters]
            return PlainTurtle(features_ND, num_clusters, PAPER.batch_size, layer_EK[:-1], layer_EK[-1])

        for num_runs in (1, len(run_blocks(settings["num_runs"], num_clusters)[-1])):
            block = block_of(range(num_runs))
            found = compare_speed(block, plain_of(block), settings["timed_steps"], settings["repeats"])
            name = f"{num_runs} run{'s' * (num_runs > 1)} together"
            mine, plain_s = found["step_s"], found["plain_step_s"]
            print(
                f"{name}: a step of a run takes {mine * 1e3:.1f} ms, plain {plain_s * 1e3:.1f} ms: "
                f"{found['share']:.2f} of the time; {PAPER.num_steps:,} steps {PAPER.num_steps * mine:.0f} s, plain "
                f"{PAPER.num_steps * plain_s:.0f} s",
                flush=True,
            )
            figures[name] = found
            bounds[f"{name}: at most a third of the time of the plain transcription"] = found["share"] <= MAX_SHARE
        ours, plain = [], []
        for number in settings["accuracy_runs"]:
            block = block_of([number])
            theirs = plain_of(block)
            for _ in range(settings["accuracy_steps"]):
                (layer_EK,) = block.new_inner()[0].tensors
                theirs.step((layer_EK[:-1], layer_EK[-1]))
                block.train_step()
            (labels,) = label_rows([features_ND], block.layers_on_given(), num_clusters, device=device, pool=pool)
            ours.append(clustering_accuracy(labels_N, labels))
            plain.append(clustering_accuracy(labels_N, theirs.labels()))
            print(f"run {number}: ACC {ours[-1]:.4f}, plain {plain[-1]:.4f}", flush=True)
    figures |= {"accuracy": float(np.mean(ours)), "plain_accuracy": float(np.mean(plain))}
    bounds[f"accuracy within {MAX_ACCURACY_LOSS} of the plain transcription's"] = (
        figures["accuracy"] >= figures["plain_accuracy"] - MAX_ACCURACY_LOSS
    )
    return figures, bounds


def planted(num_images: int, dim: int, num_clusters: int) -> tuple[Any, Any]:
    """Overlapping Gaussian clusters."""
    generator = np.random.default_rng(0)
    labels_N = generator.integers(0, num_clusters, num_images)
    centres = generator.normal(size=(num_clusters, dim)).astype(np.float32) * np.float32(4.0 / np.sqrt(dim))
    return centres[labels_N] + generator.standard_normal((num_images, dim), dtype=np.float32), labels_N


def compare_speed(block: RunBlock, theirs: PlainTurtle, num_steps: int, repeats: int) -> dict[str, Any]:
    """Seconds a step of a run, both in turn, several times; the medians. The first round warms up."""
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(repeats + 1):
        for name, step, num_runs in (("ours", block.train_step, len(block.runs)), ("plain", theirs.step, 1)):
            started = time.perf_counter()
            for _ in range(num_steps):
                step()
            seconds[name].append((time.perf_counter() - started) / num_steps / num_runs)
    step_s, plain_step_s = (float(np.median(values[1:])) for values in (seconds["ours"], seconds["plain"]))
    share = float(np.median([a / b for a, b in zip(seconds["ours"][1:], seconds["plain"][1:], strict=True)]))
    return {"step_s": step_s, "plain_step_s": plain_step_s, "share": share}
