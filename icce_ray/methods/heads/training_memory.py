"""The memory that training takes, computed before it starts.

N images, D feature dimensions, S of them that a head sees, h heads of a worker, K clusters, M and P the widths of a
head's layers, n rows of a batch, all views together.
"""

import torch

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.division import HeadDivision
from icce_ray.runtime.machine import available_memory_bytes, require_memory

MAX_HELD_BYTES = 2 * 1024**3
MAX_HELD_SHARE = 0.5
STATE_COPIES = 4
"""Student, teacher and the two moments of AdamW."""
WORK_ARRAYS = 8
"""Largest number of n x K arrays that a block of heads needs at a time."""


def training_bytes(
    settings: HeadsConfig, *, num_images: int, dim: int, num_clusters: int, batch_size: int, device: torch.device,
    num_threads: int = 1, num_workers: int = 1,
) -> int:  # fmt: skip
    """Memory of the worker with most heads, in bytes:

    ``16 h (S M + M P + P K)`` parameters and moments, ``4 h n K`` targets,
    for each head that is computed at the same time ``8 * 4 n K`` work arrays, ``4 (S M + M P + P K)`` its gradient,
    ``16 K P`` more for its prototypes, ``6 n (M + P)`` activations and ``2 n S`` inputs,
    ``24 n D`` three batches, ``8 h N`` labels, ``4 N D`` features where they are held (:func:`max_held_bytes`).
    """
    M, P, K, S = settings.hidden_dim, settings.bottleneck_dim, num_clusters, settings.num_inputs(dim)
    on_gpu = device.type == "cuda"
    division = HeadDivision.of(settings.num_heads, num_workers, on_gpu=on_gpu)
    h = max(division.num_heads)
    largest_block = max(len(block) for blocks in division.blocks for block in blocks)
    heads_at_once = largest_block if on_gpu else min(num_threads, h)
    n = batch_size * (1 + settings.num_positives)
    parameters = S * M + M * P + P * K
    state = 4 * STATE_COPIES * h * parameters
    targets = 4 * h * n * K
    work = heads_at_once * (4 * WORK_ARRAYS * n * K + 4 * parameters + 16 * K * P + 6 * n * (M + P) + 2 * n * S)
    features = 4 * num_images * dim
    held = features if features <= max_held_bytes(device) else 0
    return state + targets + work + 24 * n * dim + 8 * h * num_images + held


def require_training_memory(settings: HeadsConfig, *, device: torch.device, dim: int, **sizes: int) -> None:
    """Raises ResourceError: the machine lacks what :func:`training_bytes` says."""
    require_memory(
        training_bytes(settings, device=device, dim=dim, **sizes),
        available_memory_bytes(device),
        f"heads: {settings.num_heads} heads with {sizes['num_clusters']:,} clusters, {dim} dimensions and "
        f"{sizes['batch_size']:,} pairs a step",
        "Use more workers, lower heads.num_heads, heads.batch_size or num_clusters, or use larger machines",
        " on each worker",
    )


def max_held_bytes(device: torch.device) -> float:
    """Largest size of the features, as float32, that is kept on the device: half of a GPU's free memory; a fixed amount
    of a CPU's memory, so that the result does not depend on what else is running there."""
    return MAX_HELD_SHARE * available_memory_bytes(device) if device.type == "cuda" else MAX_HELD_BYTES
