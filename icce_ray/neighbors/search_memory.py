"""Memory that building a graph needs, known before it starts."""

from __future__ import annotations

import math

from icce_ray.neighbors.search import PAIRS_HELD, QUERY_BLOCK

MAX_ROWS_PER_PART = 16_384
"""A part is built in memory, then written."""
TORCH_BYTES = 550_000_000
"""Memory of a process that has imported torch, of which 250 MB are libraries that processes of a machine share."""
SCORED_PAIRS = 2**24
HIT_BYTES = 40
"""A pair as it is found, and its row, column and flags."""
PAIR_BYTES = 48
"""A held pair, and its hash and order while rows are cut."""


def shard_bytes(num_images: int, dim: int) -> int:
    """Memory of the features of N images in a shard, float32, and of their ids."""
    return num_images * (dim * 4 + 8)


def worker_bytes(num_images: int, dim: int, mean_neighbors: float) -> int:
    """Memory of one worker besides the features of its shard, at worst."""
    queries, rows = (min(num_images, most) for most in (QUERY_BLOCK, MAX_ROWS_PER_PART))
    hits = min(SCORED_PAIRS, num_images**2) * HIT_BYTES + min(PAIRS_HELD, num_images**2) * PAIR_BYTES
    return TORCH_BYTES + hits + int(rows * mean_neighbors * 3 * 8) + (queries + rows) * dim * 4


def needed_bytes(base_bytes: int, worker_bytes: int, num_here: int, num_workers: int) -> int:
    """Memory of a machine with `num_here` of `num_workers` workers, each with its share of the features."""
    return math.ceil(num_here * (base_bytes / num_workers + worker_bytes))
