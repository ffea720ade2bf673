from __future__ import annotations

import re

import pytest
import torch

from icce_ray.config import HeadsConfig
from icce_ray.errors import ResourceError
from icce_ray.heads.memory import check_memory, head_blocks, training_bytes

CPU = torch.device("cpu")


def needed(num_heads: int = 16, num_clusters: int = 100, **changes: int) -> int:
    sizes = {"num_images": 10_000, "dim": 256, "batch_size": 1024} | changes
    return training_bytes(HeadsConfig(num_heads=num_heads), num_clusters=num_clusters, device=CPU, **sizes)


def test_memory_grows_with_heads_times_clusters() -> None:
    per_head_and_cluster = 20 * 256 + 4 * 2048
    assert needed(num_clusters=1100) - needed(num_clusters=100) == 1000 * (16 * per_head_and_cluster + 28 * 2048)
    assert needed(num_heads=32) < 2 * needed()


def test_features_that_are_not_held_cost_nothing() -> None:
    few, many = needed(num_images=2_000_000), needed(num_images=2_200_000)  # 2.048e9 and 2.25e9 bytes
    assert many < few


def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icce_ray.heads.memory.available_memory_bytes", lambda: 8_000_000_000)
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
