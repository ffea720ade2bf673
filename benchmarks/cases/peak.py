"""The peak of a processor."""

from __future__ import annotations

import time

import torch


def matmul_peak(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of large square matrix products, on a CPU with all threads: the best of several rounds."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(4):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - started))
    return best
