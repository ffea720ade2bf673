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


def planted_neighbors(labels_N: Any, num_neighbors: int, purity: float, seed: int = 0) -> Any:
    """Neighbours (N, k) int32: each of the same cluster with probability `purity`, else any image."""
    rng = np.random.default_rng(seed)
    order = np.argsort(labels_N, kind="stable")
    sizes = np.bincount(labels_N)
    first_N, size_N = (np.cumsum(sizes) - sizes)[labels_N], sizes[labels_N]
    shape = len(labels_N), num_neighbors
    same_Nk = order[first_N[:, None] + (rng.random(shape) * size_N[:, None]).astype(np.int64)]
    anyone_Nk = rng.integers(0, len(labels_N), shape)
    return np.where(rng.random(shape) < purity, same_Nk, anyone_Nk).astype(np.int32)
