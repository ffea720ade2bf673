"""The trainer against a plain loop over heads: a module, an optimiser, float32 autograd each, same draws.

On a GPU, where there is one, the trainer runs at ImageNet's shape instead, against the matmul peak measured beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cases import datasets
from cases.peak import matmul_peak
from cases.plain_heads import PlainTrainer
from icce_ray.config import HeadsConfig, NeighborsConfig
from icce_ray.methods.heads.communicator import SingleWorker
from icce_ray.methods.heads.compiled_step import HALF, PLAIN, compiled_passes
from icce_ray.methods.heads.pair_batches import epoch_batches
from icce_ray.methods.heads.trainer import HeadTrainer
from icce_ray.metrics.true_label_scores import clustering_accuracy
from icce_ray.neighbors.graph import NeighborGraph, build_graph
from icce_ray.runtime.machine import matmul_dtype

SETTINGS: dict[str, Any] = {
    "num_images": 10_000,
    "shapes": [[2304, 10, 16], [2304, 10, 50], [1024, 100, 50]],
    "batch_size": 1024,
    "steps": 4,
    "repeats": 3,
    "accuracy_epochs": 20,
}
MIN_SPEEDUP = 3.0
MAX_ACCURACY_LOSS = 0.01
MIN_SHARE_OF_PEAK = 0.4


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    if torch.cuda.is_available():
        return _run_on_gpu()
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "matmul_gflop_per_s": 0.0}
    bounds: dict[str, bool] = {}
    for dim, num_clusters, num_heads in settings["shapes"]:
        peak = matmul_peak("cpu", matmul_dtype("auto", torch.device("cpu")), 2048)
        figures["matmul_gflop_per_s"] = max(figures["matmul_gflop_per_s"], peak / 1e9)
        name = f"{dim} dimensions, {num_clusters} clusters, {num_heads} heads"
        result = compare_speed(settings, dim, num_clusters, num_heads)
        figures[name] = result
        print(
            f"{name}: {result['seconds_per_epoch']:.2f} s an epoch, plain loop "
            f"{result['plain_seconds_per_epoch']:.2f} s: {result['speedup']:.2f} times as fast, "
            f"{result['gflop_per_s'] / figures['matmul_gflop_per_s']:.0%} of the matmul peak",
            flush=True,
        )
        bounds[f"{name}: at least {MIN_SPEEDUP:g} times as fast as the plain loop"] = result["speedup"] >= MIN_SPEEDUP
    accuracy = compare_accuracy(settings)
    figures["accuracy"] = accuracy
    print(f"mean head on planted clusters: {accuracy['ours']:.4f}, plain loop {accuracy['plain']:.4f}")
    bounds[f"accuracy within {MAX_ACCURACY_LOSS} of the plain loop's"] = (
        accuracy["ours"] >= accuracy["plain"] - MAX_ACCURACY_LOSS
    )
    return figures, bounds


def planted(num_images: int, dim: int, num_clusters: int, num_neighbors: int = 50) -> tuple[Any, NeighborGraph, Any]:
    """Overlapping Gaussian clusters, and neighbour lists of which four fifths are right."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, num_clusters, num_images)
    centres = generator.normal(size=(num_clusters, dim)).astype(np.float32)
    noise = generator.standard_normal((num_images, dim), dtype=np.float32)
    features = (centres[labels] * (4.0 / np.sqrt(dim)) + noise).astype(np.float16)
    members = [np.flatnonzero(labels == cluster) for cluster in range(num_clusters)]
    indices = np.empty((num_images, num_neighbors), dtype=np.int32)
    for image, label in enumerate(labels):
        indices[image] = generator.choice(members[label], num_neighbors)
    wrong = generator.random(indices.shape) < 0.2
    indices[wrong] = generator.integers(0, num_images, int(wrong.sum()))
    indptr = np.arange(num_images + 1, dtype=np.int64) * num_neighbors
    return features, NeighborGraph(indptr, indices.ravel()), labels


def make_trainer(
    features: Any, graph: NeighborGraph, config: HeadsConfig, num_clusters: int, device: str = "cpu", seed: int = 0
) -> HeadTrainer:
    return HeadTrainer(
        features, graph, config, num_clusters=num_clusters, seed=seed, communicator=SingleWorker(),
        device=torch.device(device), num_threads=torch.get_num_threads(),
    )  # fmt: skip


def compare_speed(settings: dict[str, Any], dim: int, num_clusters: int, num_heads: int) -> dict[str, Any]:
    """Both in turn, several times; the medians."""
    features, graph, _ = planted(settings["num_images"], dim, num_clusters)
    # The plain loop does not know of a share of the inputs: both are given all.
    config = HeadsConfig(num_heads=num_heads, batch_size=settings["batch_size"], input_share=1.0, balance=1.0)
    ours = make_trainer(features, graph, config, num_clusters)
    plain = PlainTrainer(ours.state.student, config, ours.steps_per_epoch)
    batches = list(epoch_batches(graph, ours.batch_size, 1, 0, 0))[: settings["steps"]]
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(settings["repeats"] + 1):
        started = time.perf_counter()
        ours.train_steps(map(ours.make_batch, batches))
        seconds["ours"].append((time.perf_counter() - started) / len(batches))
        started = time.perf_counter()
        for rows in batches:
            plain.step(features, rows)
        seconds["plain"].append((time.perf_counter() - started) / len(batches))
    # The first round warms up.
    step_s, plain_step_s = (float(np.median(values[1:])) for values in (seconds["ours"], seconds["plain"]))
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"][1:], seconds["plain"][1:], strict=True)]
    pairs_per_s = ours.batch_size / step_s
    flop_per_s = pairs_per_s * flop_per_pair(config, dim, num_clusters)
    return {
        "seconds_per_epoch": step_s * ours.steps_per_epoch,
        "plain_seconds_per_epoch": plain_step_s * ours.steps_per_epoch,
        "speedup": float(np.median(ratios)),
        "speedups": [round(ratio, 2) for ratio in ratios],
        "pairs_per_s": pairs_per_s,
        "gflop_per_s": flop_per_s / 1e9,
        "dtype": str(ours.dtype),
    }


def compare_accuracy(settings: dict[str, Any]) -> dict[str, float]:
    """Mean accuracy of the heads after the same epochs, here (bfloat16 where there are units for it) and there."""
    features, graph, labels = planted(3000, 128, 10)
    config = HeadsConfig(
        num_heads=4, num_epochs=settings["accuracy_epochs"], batch_size=256, input_share=1.0, balance=1.0
    )
    ours = make_trainer(features, graph, config, 10)
    plain = PlainTrainer(ours.state.student.map(torch.clone), config, ours.steps_per_epoch)
    for epoch in range(config.num_epochs):
        for rows in epoch_batches(graph, ours.batch_size, 1, 0, epoch):
            plain.step(features, rows)
        ours.train_epoch()
    return {
        "ours": float(np.mean([clustering_accuracy(labels, head) for head in ours.label_matrix()])),
        "plain": float(np.mean([clustering_accuracy(labels, head) for head in plain.label_matrix(features)])),
    }


def flop_per_pair(config: HeadsConfig, dim: int, num_clusters: int) -> float:
    """Multiplications and additions of the products for one pair: two views through the teacher (forward) and the
    student (forward, weight gradients, and the gradients of all but the first input)."""
    first, second = dim * config.hidden_dim, config.hidden_dim * config.bottleneck_dim
    last = config.bottleneck_dim * num_clusters
    per_view = 3 * first + 4 * (second + last)
    return 2.0 * 2.0 * per_view * config.num_heads


def _run_on_gpu() -> tuple[dict[str, Any], dict[str, bool]]:
    """ImageNet's shape: steps in turn with the plain loop's, an epoch as it is trained, the share of the peak."""
    dim, num_clusters, num_heads, batch_size, steps, repeats = 2048, 1000, 50, 1024, 20, 3
    peak = matmul_peak("cuda", torch.bfloat16, 8192)
    generator = np.random.default_rng(0)
    features = generator.standard_normal((40_960, dim), dtype=np.float32).astype(np.float16)
    neighbors = generator.integers(0, len(features), (len(features), 50), dtype=np.int32)
    graph = NeighborGraph(np.arange(len(features) + 1, dtype=np.int64) * 50, neighbors.ravel())
    config = HeadsConfig(num_heads=num_heads, batch_size=batch_size, num_epochs=400, input_share=1.0)
    started = time.perf_counter()
    trainer = make_trainer(features, graph, config, num_clusters, "cuda")
    start_s = time.perf_counter() - started
    is_compiled = trainer.blocks[0].passes is not PLAIN
    print(f"ready after {start_s:.1f} s; the step is {'compiled' if is_compiled else 'plain'}", flush=True)
    seconds = _time_both(trainer, features, graph, steps, repeats)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train_epoch()
    trainer.train_epoch()
    step_s = float(np.median(seconds["ours"][1:]))
    flop_per_s = batch_size * flop_per_pair(config, dim, num_clusters) / step_s
    share = flop_per_s / peak
    figures = {
        "matmul_peak_tflop_per_s": peak / 1e12,
        "start_s": start_s,
        "is_compiled": is_compiled,
        "step_s": step_s,
        "plain_step_s": float(np.median(seconds["plain"][1:])),
        "speedup": float(np.median(np.divide(seconds["plain"][1:], seconds["ours"][1:]))),
        "pairs_per_s": batch_size / step_s,
        "pairs_per_s_in_an_epoch": trainer.history[-1]["pairs_per_s"],
        "tflop_per_s": flop_per_s / 1e12,
        "share_of_matmul_peak": share,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "imagenet_400_epochs_h": 400 * 1_281_167 / trainer.history[-1]["pairs_per_s"] / 3600,
        "accuracy": _accuracy_on_gpu(),
    }
    for name, value in figures.items():
        print(f"{name}: {value}", flush=True)
    accuracy = figures["accuracy"]
    return figures, {
        f"at least {MIN_SPEEDUP:g} times as fast as the plain loop": figures["speedup"] >= MIN_SPEEDUP,
        f"at least {MIN_SHARE_OF_PEAK:.0%} of the matmul peak": share >= MIN_SHARE_OF_PEAK,
        f"accuracy within {MAX_ACCURACY_LOSS} of float32's": accuracy["compiled"]
        >= accuracy["float32"] - MAX_ACCURACY_LOSS,
    }


def _time_both(
    trainer: HeadTrainer, features: Any, graph: NeighborGraph, steps: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds a step, ours and the plain loop's in turn; the first round warms up."""
    plain_trainer = PlainTrainer(trainer.state.student, trainer.settings, trainer.steps_per_epoch, "cuda")

    def ours(batches: list[Any]) -> None:
        trainer.train_steps(map(trainer.make_batch, batches))

    def plain(batches: list[Any]) -> None:
        for rows in batches:
            plain_trainer.step(features, rows)

    batches = list(epoch_batches(graph, trainer.batch_size, 1, 0, 0))[:steps]
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(repeats + 1):
        seconds["ours"].append(_time_steps(ours, batches))
        seconds["plain"].append(_time_steps(plain, batches[:3]))
    return seconds


def _time_steps(steps: Callable[[list[Any]], None], batches: list[Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    steps(batches)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / len(batches)


def _accuracy_on_gpu() -> dict[str, Any]:
    """Mean accuracy of the heads after the same steps, in float32 and by the compiled step in half precision, on real
    features where they are, else on planted ones: three seeds."""
    data = datasets.load("cifar10_mix")
    if data is None:
        features, graph, labels = planted(10_000, 256, 10)
    else:
        features, labels = data
        graph, _ = build_graph(features, NeighborsConfig(), num_clusters=10, seed=0, device="cuda", num_threads=8)
    found: dict[str, list[float]] = {"float32": [], "compiled": []}
    for name, accuracies in found.items():
        config = HeadsConfig(num_heads=16, num_epochs=30, precision="float32" if name == "float32" else "auto")
        for seed in range(3):
            trainer = make_trainer(features, graph, config, 10, "cuda", seed)
            if name == "compiled":
                passes = compiled_passes(HALF)
                for block in trainer.blocks:
                    block.passes = passes
            for _ in range(config.num_epochs):
                trainer.train_epoch()
            accuracies.append(float(np.mean([clustering_accuracy(labels, head) for head in trainer.label_matrix()])))
    return {name: float(np.mean(accuracies)) for name, accuracies in found.items()} | {
        "features": "planted" if data is None else "cifar10_mix"
    }
