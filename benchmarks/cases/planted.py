"""Planted labels and noisy heads for the consensus cases."""

from __future__ import annotations

from typing import Any

import numpy as np


def planted_heads(num_images: int, num_heads: int, num_clusters: int, noise: float, seed: int = 0) -> tuple[Any, Any]:
    """True labels (N,) and heads (H, N) int32. Each head permutes the clusters and gives a share `noise` of the images
    a random one."""
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, num_clusters, num_images, dtype=np.int32)
    heads_HN = np.empty((num_heads, num_images), dtype=np.int32)
    for head_N in heads_HN:
        head_N[:] = rng.permutation(num_clusters)[labels_N]
        is_noise = rng.random(num_images) < noise
        head_N[is_noise] = rng.integers(0, num_clusters, int(is_noise.sum()))
    return labels_N, heads_HN
