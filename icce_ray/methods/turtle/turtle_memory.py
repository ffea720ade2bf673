"""The memory that TURTLE takes, computed before it starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from icce_ray.config import TurtleConfig
from icce_ray.methods.turtle.feature_batches import chunk_slices
from icce_ray.methods.turtle.run_block import run_blocks

WORK_ARRAYS = 6
"""Largest number of C x n float32 arrays of a chunk of n rows at a time."""
PARAMETER_COPIES = 12
"""Float32 arrays of D x C: encoder and classifier with their gradients and Adam's two moments, and the normalised
weights."""


def training_bytes(
    settings: TurtleConfig,
    *,
    num_images: int,
    dims: Sequence[int],
    num_clusters: int,
    dtype: torch.dtype,
    device: torch.device,
    num_threads: int = 1,
) -> int:
    """Memory of a worker, in bytes, for N images in S spaces of D dimensions, B of them in a batch, features of b
    bytes, C = R K columns of the R runs of a block: over all spaces ``b N D`` features, ``2 b B D`` a batch in both
    orders, ``4 D D`` the rotation, ``48 D C`` parameters, ``(b + 4) D C`` the gradient of each chunk;
    ``4 B C (2 S + 1)`` labels with the first predictions, ``24 n C S`` for each chunk of n rows that is worked on,
    ``12 R N`` labels of all images.
    """
    runs = max(map(len, run_blocks(settings.num_runs, num_clusters)))
    batch_size = min(num_images, settings.batch_size)
    chunks = chunk_slices(batch_size, device)
    chunk_rows: int = max(rows.stop - rows.start for rows in chunks)
    at_once = min(len(chunks), num_threads)
    total_dim, b, C = sum(dims), dtype.itemsize, runs * num_clusters
    features = b * total_dim * (num_images + 2 * batch_size) + 4 * max(dims) ** 2
    parameters = total_dim * C * (4 * PARAMETER_COPIES + (b + 4) * len(chunks))
    labels = 4 * batch_size * C * (2 * len(dims) + 1) + 4 * WORK_ARRAYS * chunk_rows * C * at_once * len(dims)
    return features + parameters + labels + 12 * runs * num_images
