"""Hashes of labels, to break ties without bias and to find images that all heads label alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.label_matrix import HeadLabels
from icce_ray.consensus.partition import PartitionError
from icce_ray.random_numbers import GOLDEN_GAMMA, mix64

SECOND_GAMMA = np.uint64(0xD1B54A32D192ED03)


def hash_numbers(a: npt.NDArray[Any], b: npt.NDArray[Any], seed: int) -> npt.NDArray[np.uint64]:
    """Evenly spread 64-bit numbers that depend on `a`, `b` and the seed only."""
    mixed = mix64(a.astype(np.uint64) * GOLDEN_GAMMA + np.uint64(seed))
    return mix64(mixed + b.astype(np.uint64) * SECOND_GAMMA)


def group_equal_images(heads: HeadLabels, num_clusters: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Groups of images that all heads label alike: the first image of each group (G,), and the group of each image
    (N,).

    Groups are compared by a 64-bit hash of the labels: among a million groups, two collide with probability 1e-7.
    Raises PartitionError: there are fewer groups than `num_clusters`."""
    keys_N = np.zeros(heads.num_images, dtype=np.uint64)
    for codes_N in heads.codes:
        keys_N = hash_numbers(keys_N, codes_N + 1, seed=0)
    _, first_G, group_N = np.unique(keys_N, return_index=True, return_inverse=True)
    if len(first_G) < num_clusters:
        raise PartitionError(f"only {len(first_G)} images differ in their labels, fewer than {num_clusters} clusters")
    return first_G, group_N
