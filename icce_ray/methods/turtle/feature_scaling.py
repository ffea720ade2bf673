"""Features in the scale that TURTLE's inner classifiers need (docs/METHOD.md, "TURTLE")."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.methods.heads.inputs import random_rotation
from icce_ray.runtime.threads import ThreadPool

ROWS_AT_ONCE = 4096
"""A block of rows is summed by one thread, and the blocks in their order, so threads don't change a bit."""
MIN_VARIANCE = 1e-30
"""Features that are all equal become 0."""


def prepare_features(
    features_ND: npt.NDArray[Any],
    *,
    scale: bool,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    pool: ThreadPool,
) -> torch.Tensor:
    """The features on the device, (N, D) in `dtype`.

    Args:
        features_ND: float16 or float32, may be memory-mapped.
        scale: centre them, rotate them at random, and divide all by one number, so that the mean variance is 1.
        seed: seed of the rotation.
        dtype: float32 or bfloat16.
        device: where they go.
        pool: threads for the blocks of rows.
    """
    num_rows, dim = features_ND.shape
    prepared_ND = torch.empty((num_rows, dim), dtype=dtype, device=device)
    starts = range(0, num_rows, ROWS_AT_ONCE)

    def read(start: int) -> torch.Tensor:
        block = np.array(features_ND[start : start + ROWS_AT_ONCE], dtype=np.float32)
        return torch.from_numpy(block).to(device)

    if scale:
        sums = pool.map(lambda start: read(start).sum(dim=0, dtype=torch.float64), starts)
        mean_D = (reduce(torch.add, sums) / num_rows).float()
        squares = pool.map(lambda start: (read(start) - mean_D).square().sum(dtype=torch.float64), starts)
        variance = float(reduce(torch.add, squares)) / features_ND.size
        mix_DD = random_rotation(dim, seed).to(device) / max(variance, MIN_VARIANCE) ** 0.5

    def fill(start: int) -> None:
        rows_nD = read(start)
        prepared_ND[start : start + len(rows_nD)] = (rows_nD - mean_D) @ mix_DD if scale else rows_nD

    pool.map(fill, starts)
    return prepared_ND
