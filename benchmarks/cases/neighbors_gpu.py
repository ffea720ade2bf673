"""The exact graph of as many images as ImageNet has, on one GPU: seconds by step, and equality with a CPU's.

What the stage does on a worker, without Ray: load the shard, search all images, merge to rows. The answers for a sample
of the images are compared with those of a CPU, which reads the same features in several shards.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

from cases.peak import matmul_peak
from icce_ray.neighbors.adaptive_rule import Queries, Rule
from icce_ray.neighbors.graph import merge_shards, part_ranges, search_shard
from icce_ray.neighbors.search import merge, search
from icce_ray.neighbors.torch_engine import TorchEngine
from icce_ray.runtime.threads import in_threads
from icce_ray.sample.unit_features import Ids, UnitFeatures, prepare

SETTINGS: dict[str, Any] = {
    "num_images": 1_281_167,
    "dim": 1024,
    "min_neighbors": 50,
    "mean_neighbors": 200,
    "max_neighbors": 1000,
    "compared_queries": 512,
    "num_shards_on_cpu": 16,
}


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    if not torch.cuda.is_available():
        print("no GPU here: nothing to measure")
        return {}, {}
    num_images, dim = settings["num_images"], settings["dim"]
    num_threads = len(os.sched_getaffinity(0))
    seconds: dict[str, float] = {}
    features = clustered(num_images, dim)
    with _Timed(seconds, "mean"):
        prepared = prepare(features, True)
    with _Timed(seconds, "load"):
        engine = TorchEngine(prepared, np.arange(num_images), "cuda", num_threads)
    rule = Rule(_threshold(engine, settings["mean_neighbors"]), settings["min_neighbors"],
                settings["max_neighbors"], seed=0)  # fmt: skip
    # First, so that a run that is ended early has shown it.
    is_equal = equals_cpu(engine, prepared, rule, settings)
    print(f"the same rows as on a CPU: {is_equal}", flush=True)
    seconds |= {"search": 0.0, "merge": 0.0}
    num_edges = num_at_min = 0
    torch.cuda.reset_peak_memory_stats()
    for start, stop in part_ranges(num_images):
        ids = np.arange(start, stop)
        if start and start % (20 * (stop - start)) == 0:
            print(f"{start:,} images: { {name: round(value, 1) for name, value in seconds.items()} }", flush=True)
        with _Timed(seconds, "search"):
            answer = search_shard(engine, prepared, ids, rule)
        with _Timed(seconds, "merge"):
            rows = merge_shards([answer], prepared, ids, rule, num_threads)
        num_edges += len(rows.indices)
        num_at_min += int((rows.num_hits < rule.min_neighbors).sum())
    floor_s = 2.0 * num_images**2 * dim / matmul_peak("cuda", torch.float16, 8192)
    total_s = seconds["load"] + seconds["search"] + seconds["merge"]
    figures = {
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "total_s": round(total_s, 2),
        "products_alone_at_peak_s": round(floor_s, 2),
        "threads": num_threads,
        "blocks_at_once": engine.blocks_at_once,
        "mean_neighbors": num_edges / num_images,
        "share_at_min": num_at_min / num_images,
        "gpu_memory_bytes": torch.cuda.max_memory_allocated(),
    }
    print(f"{num_images:,} x {dim}: {total_s:.1f} s ({figures['seconds']}); the products alone {floor_s:.1f} s at peak")
    return figures, {"the rows that were compared are those of a CPU": is_equal}


def clustered(num_images: int, dim: int) -> Any:
    """Overlapping Gaussian clusters of different tightness, (N, D) float16, made on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    centres = torch.randn(1000, dim, generator=generator, device="cuda")
    features = np.empty((num_images, dim), np.float16)
    for start in range(0, num_images, 1 << 16):
        rows = features[start : start + (1 << 16)]
        member = torch.randint(0, 1000, (len(rows),), generator=generator, device="cuda")
        noise = torch.randn(len(rows), dim, generator=generator, device="cuda")
        rows[:] = (centres[member] + (1.0 + member[:, None] / 1000) * noise).half().cpu().numpy()
    return features


def equals_cpu(engine: TorchEngine, prepared: UnitFeatures, rule: Rule, settings: dict[str, Any]) -> bool:
    ids = np.sort(np.random.default_rng(1).choice(len(prepared), settings["compared_queries"], replace=False))
    queries = Queries(prepared, ids)

    def of_shard(shard_ids: Ids) -> Any:
        return search(TorchEngine(prepared, shard_ids), queries, rule)

    num_shards = settings["num_shards_on_cpu"]
    answers = in_threads(of_shard, np.array_split(np.arange(len(prepared)), num_shards), num_shards)
    found = []
    for candidates in (merge(answers, queries, rule), search(engine, queries, rule)):
        pairs = candidates.pairs
        order = np.lexsort((pairs.ids_P, pairs.rows_P))
        found.append((pairs.rows_P[order], pairs.ids_P[order], candidates.num_hits_Q))
    return all(np.array_equal(cpu, gpu) for cpu, gpu in zip(*found, strict=True))


def _threshold(engine: TorchEngine, mean_neighbors: int) -> float:
    """The cosine that so many images reach on average, from a sample."""
    rows_nD = engine._rows_nD[:: max(1, len(engine.ids_n) // 256)]
    share = (mean_neighbors + 1) / len(engine.ids_n)
    kept = [(rows_nD @ block.T).topk(4 * mean_neighbors, dim=1).values for block in engine._rows_nD.split(1 << 17)]
    scores = torch.cat(kept, dim=1).flatten()
    return round(float(scores.sort(descending=True).values[round(share * len(rows_nD) * len(engine.ids_n))]), 4)


class _Timed:
    """Adds the seconds of a block to a sum."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.started
