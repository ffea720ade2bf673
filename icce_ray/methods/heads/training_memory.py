"""What training takes, known before it starts; how the heads are cut into blocks.

N images, D feature dimensions, S of them that a head sees, H heads, K clusters, M and P the widths of a head's layers,
n rows of a batch, all views together.
"""

from __future__ import annotations

import torch

from icce_ray.config import HeadsConfig
from icce_ray.errors import ResourceError
from icce_ray.runtime.machine import available_memory_bytes

MAX_HELD_BYTES = 2 * 1024**3
MAX_HELD_SHARE = 0.5
MAX_GPU_BLOCK_BYTES = 1024**3
PARAMETER_COPIES = 5
"""Student, teacher, gradient and the two moments of AdamW."""
WORK_ARRAYS = 7
"""Arrays of n x K that a block of heads holds at the same time, at worst."""


def training_bytes(
    config: HeadsConfig, *, num_images: int, dim: int, num_clusters: int, batch_size: int, device: torch.device,
    num_threads: int = 1, num_workers: int = 1,
) -> int:  # fmt: skip
    """Memory of one worker in bytes:

    ``20 H (S M + M P + P K)`` parameters, gradients and moments, ``4 H n K`` targets,
    for each head that is computed at the same time ``7 * 4 n K`` work arrays, ``16 K P`` for the gradient of its
    prototypes, ``6 n (M + P)`` activations and ``2 n S`` inputs,
    ``12 n D`` the batch, ``8 H N`` labels, ``4 N D`` features where they are held (:func:`max_held_bytes`).
    """
    H, M, P, K = config.num_heads, config.hidden_dim, config.bottleneck_dim, num_clusters
    rows = -(-batch_size // num_workers) * (1 + config.num_positives)
    block = head_blocks(device, H, rows, K)[0]
    heads_at_once = int(block.stop - block.start) * (num_threads if device.type == "cpu" else 1)
    if num_workers > 1:  # the targets of all heads are balanced together
        heads_at_once = H
    S = config.num_inputs(dim)
    parameters: int = 4 * PARAMETER_COPIES * H * (S * M + M * P + P * K)
    targets = 4 * H * rows * K
    work = heads_at_once * (rows * (4 * WORK_ARRAYS * K + 6 * (M + P) + 2 * S) + 16 * K * P)
    features = 4 * num_images * dim
    held = features if features <= max_held_bytes(device) else 0
    return parameters + targets + work + 12 * rows * dim + 8 * H * num_images + held


def check_memory(
    config: HeadsConfig, *, num_images: int, dim: int, num_clusters: int, batch_size: int, device: torch.device,
    num_threads: int = 1, num_workers: int = 1,
) -> None:  # fmt: skip
    """Refuse before anything is allocated.

    Raises:
        ResourceError: how much is needed, how much there is, what to set.
    """
    needed = training_bytes(
        config, num_images=num_images, dim=dim, num_clusters=num_clusters, batch_size=batch_size, device=device,
        num_threads=num_threads, num_workers=num_workers,
    )  # fmt: skip
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory_bytes()
    if needed > available:
        raise ResourceError(
            f"training {config.num_heads} heads with {num_clusters:,} clusters on {dim} dimensions, {batch_size:,} "
            f"pairs a step, needs about {needed / 1e9:.1f} GB on each worker; {available / 1e9:.1f} GB are free. Lower "
            "heads.num_heads, heads.batch_size or num_clusters, or use larger machines"
        )


def max_held_bytes(device: torch.device) -> float:
    """Up to how many bytes of features, as float32, are kept on the device: half of what a GPU has left; a fixed amount
    of a CPU's memory, so that the result does not depend on what else is running there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return MAX_HELD_SHARE * free
    return MAX_HELD_BYTES


def head_blocks(device: torch.device, num_heads: int, num_rows: int, num_clusters: int) -> list[slice]:
    """The runs of heads that are computed together: one head on a CPU, whose activations then stay in a core's cache;
    on a GPU as many as `MAX_GPU_BLOCK_BYTES` of cosines allow."""
    size = 1
    if device.type == "cuda":
        size = max(1, min(num_heads, MAX_GPU_BLOCK_BYTES // (4 * num_rows * num_clusters)))
    return [slice(start, min(start + size, num_heads)) for start in range(0, num_heads, size)]
