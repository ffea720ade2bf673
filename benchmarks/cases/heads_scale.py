"""Training heads on several workers: bytes and collectives of a step, step time against the work divided, memory.

Workers are processes of this machine with one thread each, and talk over gloo. Where there are more of them than cores,
the ideal step time is that of the cores. The bound is for what is lost to communication and to the input that every
worker prepares, in CPU seconds, which are counted in those calls. What the whole step loses is printed beside it: by
the clock, which needs an idle machine, and by CPU seconds. That includes waiting, and whatever else processes on one
machine cost each other.

H heads, B pairs of a step, K clusters, W workers.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from cases.heads import planted
from icce_ray.config import HeadsConfig
from icce_ray.errors import ResourceError
from icce_ray.methods.heads.communicator import TorchDistributed
from icce_ray.methods.heads.division import HeadDivision
from icce_ray.methods.heads.pair_batches import epoch_batches
from icce_ray.methods.heads.step import Batch
from icce_ray.methods.heads.trainer import HeadTrainer

SETTINGS: dict[str, Any] = {
    "num_images": 4096,
    "dim": 1024,
    "num_clusters": 100,
    "num_heads": 50,
    "batch_size": 1024,
    "num_workers": [1, 2, 4],
    "repeats": 3,
    "many_clusters": 50_000,
}
MAX_LOST = 0.1
MAX_BYTES_EACH = 4e9
MIN_SPEEDUP_OF_8_GPUS = 6.5

GPU_STEP_S = 0.00495
"""One H200, ImageNet's shape: H = 50, B = 1024, K = 1000, 2048 dimensions (`heads`, results/2026-11-27-gpu.txt)."""
GPU_INPUT_S = 11.5 * 4 * 2048 * 2048 / 4.8e12
"""Gathering and normalising the batch, which every GPU does: the reads and writes that the code makes, at the memory's
rate."""
GPUS_PER_NODE = 8
COLLECTIVE_LATENCY_S = {True: 25e-6, False: 50e-6}
"""NCCL within a node and between nodes. Assumed, not measured; so is the next."""
COLLECTIVE_BYTES_PER_S = 50e9


class CountingCommunicator(TorchDistributed):
    """Counts what this worker sends to each other worker."""

    num_collectives, num_bytes, cpu_s = 0, 0, 0.0

    def gather(self, rows: torch.Tensor, num_rows: Sequence[int]) -> torch.Tensor:
        self.num_collectives += 1
        self.num_bytes += max(num_rows) * rows[:1].nbytes
        started = time.thread_time()
        gathered = super().gather(rows, num_rows)
        self.cpu_s += time.thread_time() - started
        return gathered


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    figures: dict[str, Any] = {}
    bounds: dict[str, bool] = {}
    num_cores = len(os.sched_getaffinity(0))
    alone: dict[str, float] = {}
    for num_workers in settings["num_workers"]:
        result = measure(settings, num_workers)
        alone = alone or result
        division = HeadDivision.of(settings["num_heads"], num_workers, on_gpu=False)
        share = max(division.num_heads) / settings["num_heads"]
        ideal_s = alone["step_s"] * max(share, 1 / num_cores)
        result["lost_by_clock"] = 1 - ideal_s / result["step_s"]
        result["lost_by_cpu_seconds"] = 1 - alone["cpu_s"] / result["cpu_s"]
        shared_s = result["input_s"] * (1 - 1 / num_workers) + (result["gather_s"] if num_workers > 1 else 0.0)
        result["lost_to_input_and_communication"] = shared_s / result["cpu_s"]
        formula = 0 if num_workers == 1 else max(division.num_heads) * settings["batch_size"] * 4
        figures[f"{num_workers} workers"] = result
        print(
            f"{num_workers} workers: {result['step_s']:.2f} s a step, ideal {ideal_s:.2f}; CPU seconds of all "
            f"{result['cpu_s']:.2f}, {result['lost_by_cpu_seconds']:.1%} lost, "
            f"{result['lost_to_input_and_communication']:.1%} to input and communication; "
            f"{result['collectives']:g} collective a step, {result['bytes_sent']:,.0f} bytes to each other worker "
            f"(formula {formula:,}); {result['peak_bytes'] / 1e9:.2f} GB each",
            flush=True,
        )
        if num_workers > 1:
            name = f"{num_workers} workers"
            bounds[f"{name}: one collective a step"] = result["collectives"] == 1
            bounds[f"{name}: bytes as by the formula"] = result["bytes_sent"] == formula
            bounds[f"{name}: at most {MAX_LOST:.0%} lost to input and communication"] = (
                result["lost_to_input_and_communication"] <= MAX_LOST
            )
            bounds[f"{name}: the losses of one worker, bit for bit"] = result["losses"] == alone["losses"]
    figures["GPUs"] = predict_gpus()
    bounds[f"8 GPUs at least {MIN_SPEEDUP_OF_8_GPUS} times as fast as one"] = (
        figures["GPUs"]["8"]["speedup"] >= MIN_SPEEDUP_OF_8_GPUS
    )
    many = settings | {
        "num_heads": 16, "num_clusters": settings["many_clusters"], "dim": 32, "num_images": 2000, "batch_size": 64,
        "repeats": 1,
    }  # fmt: skip
    figures["many clusters"] = measure(many, 4)
    peak = figures["many clusters"]["peak_bytes"]
    print(f"16 heads of {settings['many_clusters']:,} clusters on 4 workers: {peak / 1e9:.2f} GB each", flush=True)
    bounds[f"16 heads of {settings['many_clusters']:,} clusters within {MAX_BYTES_EACH / 1e9:g} GB each"] = (
        peak <= MAX_BYTES_EACH
    )
    return figures, bounds


def measure(settings: dict[str, Any], num_workers: int) -> dict[str, Any]:
    """Medians over epochs; the first one warms up."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, folder, json.dumps(settings), str(num_workers)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        workers = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(num_workers)]
        if sum(worker.wait() for worker in workers):
            raise RuntimeError(f"a worker of {num_workers} failed")
        results = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_workers)]
    return {
        "step_s": float(np.median(np.max([result["step_s"] for result in results], axis=0))),
        **{
            name: float(np.median(np.sum([result[name] for result in results], axis=0)))
            for name in ("cpu_s", "input_s", "gather_s")
        },
        "collectives": results[0]["collectives"],
        "bytes_sent": results[0]["bytes_sent"] if num_workers > 1 else 0,
        "peak_bytes": max(result["peak_bytes"] for result in results),
        "losses": results[0]["losses"],
    }


def predict_gpus() -> dict[str, dict[str, float]]:
    """Step time on 1 to 64 GPUs at ImageNet's shape: the input that all compute, the heads of the fullest GPU, and one
    collective. It supposes that a block of four heads runs at the rate that all 50 together had."""
    head_s = (GPU_STEP_S - GPU_INPUT_S) / 50
    predicted: dict[str, dict[str, float]] = {}
    for num_gpus in (1, 2, 4, 8, 16, 32, 64):
        try:
            most = max(HeadDivision.of(50, num_gpus, on_gpu=True).num_heads)
        except ResourceError as error:
            print(f"{num_gpus} GPUs: refused: {error}", flush=True)
            continue
        latency_s = COLLECTIVE_LATENCY_S[num_gpus <= GPUS_PER_NODE]
        collective_s = 0.0 if num_gpus == 1 else latency_s + 50 * 1024 * 4 / COLLECTIVE_BYTES_PER_S
        step_s = GPU_INPUT_S + most * head_s + collective_s
        predicted[str(num_gpus)] = {"heads": most, "step_s": step_s, "speedup": GPU_STEP_S / step_s}
        print(f"{num_gpus} GPUs: {most} heads each, {step_s * 1e3:.2f} ms a step, {GPU_STEP_S / step_s:.1f} times one")
    return predicted


def work(folder: Path, settings: dict[str, Any], num_workers: int, rank: int) -> None:
    """One worker: time epochs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_workers)
    communicator = CountingCommunicator()
    features, graph, _ = planted(settings["num_images"], settings["dim"], min(settings["num_clusters"], 100))
    config = HeadsConfig(num_heads=settings["num_heads"], batch_size=settings["batch_size"])
    trainer = HeadTrainer(
        features, graph, config, num_clusters=settings["num_clusters"], seed=0, communicator=communicator,
        device=torch.device("cpu"), num_threads=1,
    )  # fmt: skip
    rows = list(epoch_batches(graph, trainer.batch_size, 1, 0, 0))[:4]
    found: dict[str, list[float]] = {"step_s": [], "cpu_s": [], "input_s": [], "gather_s": []}
    input_s = 0.0

    def make_batch(rows: npt.NDArray[np.int64]) -> Batch:
        nonlocal input_s
        started = time.thread_time()
        batch = trainer.make_batch(rows)
        input_s += time.thread_time() - started
        return batch

    for _ in range(settings["repeats"] + 1):
        communicator.num_collectives, communicator.num_bytes, communicator.cpu_s, input_s = 0, 0, 0.0, 0.0
        dist.barrier()
        started, cpu_started = time.perf_counter(), time.process_time()
        loss_sum_h, _ = trainer.train_steps(map(make_batch, rows))
        found["step_s"].append((time.perf_counter() - started) / len(rows))
        found["cpu_s"].append((time.process_time() - cpu_started) / len(rows))
        found["input_s"].append(input_s / len(rows))
        found["gather_s"].append(communicator.cpu_s / len(rows))
    collectives, num_bytes = communicator.num_collectives / len(rows), communicator.num_bytes / len(rows)
    losses_H = communicator.gather(loss_sum_h, trainer.division.num_heads)
    result = {name: values[1:] for name, values in found.items()} | {
        "collectives": collectives,
        "bytes_sent": num_bytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": losses_H.tolist(),
    }
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
