from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from icce_ray.config import HeadsConfig
from icce_ray.errors import ResourceError
from icce_ray.methods.heads.training_memory import check_memory, head_blocks, training_bytes

CPU = torch.device("cpu")


def needed(num_heads: int = 16, num_clusters: int = 100, **changes: int) -> int:
    sizes = {"num_images": 10_000, "dim": 256, "batch_size": 1024} | changes
    return training_bytes(HeadsConfig(num_heads=num_heads), num_clusters=num_clusters, device=CPU, **sizes)


def test_memory_grows_with_heads_times_clusters() -> None:
    per_head_and_cluster = 20 * 256 + 4 * 2048
    assert needed(num_clusters=1100) - needed(num_clusters=100) == 1000 * (
        16 * per_head_and_cluster + 28 * 2048 + 16 * 256
    )
    assert needed(num_heads=32) < 2 * needed()


def test_features_that_are_not_held_cost_nothing() -> None:
    few, many = needed(num_images=2_000_000), needed(num_images=2_200_000)  # 2.048e9 and 2.25e9 bytes
    assert many < few


def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icce_ray.methods.heads.training_memory.available_memory_bytes", lambda: 8_000_000_000)
    sizes = {"num_images": 5000, "dim": 256, "batch_size": 512, "device": CPU, "num_threads": 2}
    check_memory(HeadsConfig(num_heads=16), num_clusters=25_000, **sizes)
    message = r"200 heads with 50,000 clusters .* needs about (\d+)\.\d GB on each worker; 8.0 GB are free. Lower heads"
    with pytest.raises(ResourceError, match=message) as caught:
        check_memory(HeadsConfig(num_heads=200), num_clusters=50_000, **sizes)
    found = re.search(message, str(caught.value))
    assert found
    assert int(found[1]) > 60


def test_blocks_cover_all_heads_and_fit_on_a_gpu() -> None:
    assert head_blocks(CPU, 3, 2048, 10) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    gpu = torch.device("cuda")
    assert head_blocks(gpu, 50, 2048, 1000) == [slice(0, 50)]
    blocks = head_blocks(gpu, 16, 2048, 50_000)
    assert [block.stop - block.start for block in blocks] == [2] * 8


OVERCLUSTERING = """
import resource
import numpy as np, torch
from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.training_memory import training_bytes
from icce_ray.methods.heads.sampling import epoch_batches
from icce_ray.methods.heads.training import HeadTrainer
from icce_ray.neighbors.graph import NeighborGraph

N, D, K = 30_000, 32, 25_000
generator = np.random.default_rng(0)
features = generator.standard_normal((N, D), dtype=np.float32)
graph = NeighborGraph(np.arange(N + 1, dtype=np.int64) * 5, generator.integers(0, N, 5 * N, dtype=np.int32))
config = HeadsConfig(num_heads=16, batch_size=256, freeze_last_layer_epochs=0)
started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
trainer = HeadTrainer(features, graph, config, num_clusters=K, seed=0, num_threads=2)
rows, num_pairs = next(iter(epoch_batches(graph, 256, 1, 0, 0, 0, 1)))
assert trainer.train_step(rows, num_pairs, 1e-3, 0.1).isfinite().all()
needed = training_bytes(
    config, num_images=N, dim=D, num_clusters=K, batch_size=256, device=torch.device("cpu"), num_threads=2
)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - started, needed)
"""


@pytest.mark.slow
def test_sixteen_heads_of_25_000_clusters_train_within_8_gb_and_the_stated_memory() -> None:
    done = subprocess.run([sys.executable, "-c", OVERCLUSTERING], capture_output=True, text=True, check=True)
    taken, stated = (int(word) for word in done.stdout.split())
    assert taken < 8e9
    assert 0.6 * stated < taken < 1.1 * stated
