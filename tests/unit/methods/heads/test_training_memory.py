from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from icce_ray.config import HeadsConfig
from icce_ray.errors import ResourceError
from icce_ray.methods.heads import training_memory
from icce_ray.methods.heads.communicator import SingleWorker
from icce_ray.methods.heads.trainer import HeadTrainer
from icce_ray.methods.heads.training_memory import training_bytes
from icce_ray.neighbors.graph import NeighborGraph

CPU = torch.device("cpu")


def needed(num_heads: int = 16, num_clusters: int = 100, **changes: int) -> int:
    sizes = {"num_images": 10_000, "dim": 256, "batch_size": 1024} | changes
    return training_bytes(HeadsConfig(num_heads=num_heads), num_clusters=num_clusters, device=CPU, **sizes)


def test_memory_grows_with_heads_times_clusters() -> None:
    per_head_and_cluster = 16 * 256 + 4 * 2048
    assert needed(num_clusters=1100) - needed(num_clusters=100) == 1000 * (
        16 * per_head_and_cluster + 32 * 2048 + 20 * 256
    )
    assert needed(num_heads=32) < 2 * needed()


def test_memory_falls_with_the_share_of_heads() -> None:
    sizes = {"num_images": 0, "dim": 16, "batch_size": 256, "num_clusters": 50_000}
    alone, shared = needed(**sizes), needed(**sizes, num_workers=4)
    assert 0.25 * alone < shared < 0.4 * alone
    assert needed(**sizes, num_workers=16) < 0.6 * shared


def test_sixteen_heads_of_25_000_clusters_fit_into_4_gb_and_with_50_000_into_four_times_4() -> None:
    assert 3e9 < needed(num_images=30_000, dim=32, num_clusters=25_000, batch_size=256, num_threads=2) < 4e9
    assert 1e9 < needed(num_images=30_000, dim=32, num_clusters=50_000, batch_size=64, num_workers=4) < 4e9


def test_features_that_are_not_held_cost_nothing() -> None:
    few, many = needed(num_images=2_000_000), needed(num_images=2_200_000)  # 2.048e9 and 2.25e9 bytes
    assert many < few


def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_memory, "available_memory_bytes", lambda device: 8_000_000_000)
    features, graph = np.zeros((5000, 256), np.float32), NeighborGraph(np.arange(5001), np.zeros(5000, np.int32))
    message = r"200 heads with 50,000 clusters.* about (\d+)\.\d GB on each worker; 8.0 GB are free. Use more workers"
    with pytest.raises(ResourceError, match=message) as caught:
        HeadTrainer(
            features, graph, HeadsConfig(num_heads=200, batch_size=512), num_clusters=50_000, seed=0,
            communicator=SingleWorker(), device=CPU, num_threads=2,
        )  # fmt: skip
    found = re.search(message, str(caught.value))
    assert found
    assert int(found[1]) > 60


MANY_CLUSTERS = """
from pathlib import Path
import numpy as np, torch
from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.training_memory import training_bytes
from icce_ray.methods.heads.communicator import SingleWorker
from icce_ray.methods.heads.pair_batches import epoch_batches
from icce_ray.methods.heads.trainer import HeadTrainer
from icce_ray.neighbors.graph import NeighborGraph

# Arrays of over 32 MB go back to the system when they are freed.
N, D, K = 8_000, 32, 20_000
generator = np.random.default_rng(0)
features = generator.standard_normal((N, D), dtype=np.float32)
graph = NeighborGraph(np.arange(N + 1, dtype=np.int64) * 5, generator.integers(0, N, 5 * N, dtype=np.int32))
config = HeadsConfig(num_heads=6, batch_size=256, freeze_last_layer_epochs=0)
cpu = torch.device("cpu")

def peak_bytes():
    # Of this program alone: ru_maxrss would count the process that started it.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

# What torch's libraries take at their first use is not the training's.
warm_up = torch.randn(256, 256, dtype=torch.bfloat16)
(warm_up @ warm_up, warm_up.float() @ warm_up.float())
started = peak_bytes()
trainer = HeadTrainer(
    features, graph, config, num_clusters=K, seed=0, communicator=SingleWorker(), device=cpu, num_threads=2
)
rows = next(iter(epoch_batches(graph, 256, 1, 0, 0)))
assert trainer.train_steps([trainer.make_batch(rows)] * 2)[0].isfinite().all()
needed = training_bytes(
    config, num_images=N, dim=D, num_clusters=K, batch_size=256, device=cpu, num_threads=2
)
print(peak_bytes() - started, needed)
"""


@pytest.mark.slow
def test_training_takes_the_stated_memory() -> None:
    done = subprocess.run([sys.executable, "-c", MANY_CLUSTERS], capture_output=True, text=True, check=True)
    taken, stated = (int(word) for word in done.stdout.split())
    assert 0.6 * stated < taken < 1.1 * stated
