"""Settings for small runs, and workers that are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from icce_ray.config import HeadsConfig
from icce_ray.methods.clusterings import Clusterings
from icce_ray.methods.heads.communicator import SingleWorker
from icce_ray.methods.heads.fit import fit
from icce_ray.methods.heads.trainer import HeadTrainer

TIMEOUT_S = 120


def small_settings(**changes: object) -> HeadsConfig:
    small = {
        "num_heads": 3, "num_epochs": 7, "batch_size": 64, "hidden_dim": 16, "bottleneck_dim": 8,
        "precision": "float32", "warmup_epochs": 2, "learning_rate": 1e-2, "teacher_momentum": 0.98,
    }  # fmt: skip
    return HeadsConfig.model_validate(small | changes)


def make_trainer(planted: Any, settings: HeadsConfig, **changes: Any) -> HeadTrainer:
    options = {"communicator": SingleWorker(), "device": torch.device("cpu"), "num_threads": 1} | changes
    return HeadTrainer(planted[0], planted[1], settings, num_clusters=4, seed=0, **options)


class _ThreadWorkers:
    """What the workers share."""

    def __init__(self, num_workers: int) -> None:
        self.barrier = threading.Barrier(num_workers, timeout=TIMEOUT_S)
        self.slots: list[torch.Tensor] = [torch.empty(0)] * num_workers


class ThreadWorker:
    """A communicator whose workers meet at a barrier."""

    def __init__(self, group: _ThreadWorkers, rank: int) -> None:
        self.group, self.rank, self.num_workers = group, rank, len(group.slots)
        self.shapes: list[tuple[int, ...]] = []

    def gather(self, rows: torch.Tensor, num_rows: Sequence[int]) -> torch.Tensor:
        assert len(rows) == num_rows[self.rank]
        self.shapes.append(tuple(rows.shape))
        self.group.slots[self.rank] = rows.clone()
        self.group.barrier.wait()
        joined = torch.cat(self.group.slots)
        self.group.barrier.wait()
        return joined

    def gather_on_first(self, rows: torch.Tensor, num_rows: Sequence[int]) -> torch.Tensor:
        return self.gather(rows, num_rows)[: sum(num_rows) if self.rank == 0 else 0]


def fit_on_workers(
    num_workers: int, features: Any, graph: Any, settings: HeadsConfig, num_clusters: int = 4, **options: Any
) -> list[Clusterings]:
    """What each of several workers returns. With an error in one of them the others fail too."""
    group = _ThreadWorkers(num_workers)
    results: dict[int, Clusterings | BaseException] = {}

    def work(rank: int) -> None:
        try:
            results[rank] = fit(
                features, graph, settings, num_clusters=num_clusters, seed=0, communicator=ThreadWorker(group, rank),
                **{"num_threads": 1} | options,
            )  # fmt: skip
        except BaseException as error:
            results[rank] = error
            group.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=TIMEOUT_S)
    errors = [result for result in results.values() if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [results[rank] for rank in range(num_workers)]  # type: ignore[misc]
