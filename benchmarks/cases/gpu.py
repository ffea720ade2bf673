"""What a GPU can do at most."""

from __future__ import annotations

import time

import torch


def matmul_peak() -> float:
    """FLOP/s of a large bfloat16 product on this GPU."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - started)
