"""Planted partitions: heads that are noisy, permuted copies of a known clustering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Planted = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def make_planted(sizes: list[int], num_heads: int, noise: float, seed: int = 0, merges: bool = False) -> Planted:
    """True labels (N,) in random order and heads (H, N): each a permutation of the labels, a share `noise` of the
    images with a random one; with `merges`, each head merges two clusters and splits a third at random."""
    rng = np.random.default_rng(seed)
    num_clusters = len(sizes)
    labels_N = rng.permutation(np.repeat(np.arange(num_clusters), sizes))
    heads = []
    for _ in range(num_heads):
        head_N = labels_N.copy()
        if merges:
            first, second, third = rng.choice(num_clusters, 3, replace=False)
            head_N[head_N == first] = second
            head_N[(head_N == third) & (rng.random(len(head_N)) < 0.5)] = first
        is_noise = rng.random(len(head_N)) < noise
        head_N[is_noise] = rng.integers(0, num_clusters, is_noise.sum())
        heads.append(rng.permutation(num_clusters)[head_N])
    return labels_N, np.array(heads)


def make_near(labels_N: npt.NDArray[Any], purity: float, num_neighbors: int = 10) -> npt.NDArray[np.int64]:
    """Neighbours (N, k): each of the same cluster with probability `purity`, else any image."""
    rng = np.random.default_rng(0)
    same = [rng.choice(np.flatnonzero(labels_N == label), num_neighbors) for label in labels_N]
    anyone = rng.integers(0, len(labels_N), (len(labels_N), num_neighbors))
    return np.where(rng.random(anyone.shape) < purity, same, anyone)


@pytest.fixture(scope="session")
def near() -> Callable[..., Any]:
    return make_near


@pytest.fixture(scope="session")
def planted() -> Callable[..., Any]:
    return make_planted
