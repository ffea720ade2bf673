"""Which pairs a step sees. Everything follows from the seed and the epoch, so every worker draws the same pairs, takes
its share of each batch, and a resumed run sees what the undisturbed one saw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from icce_ray.neighbors.graph import NeighborGraph

STEPS_PER_EPOCH = 8


def choose_batch_size(num_images: int, batch_size: int | Literal["auto"]) -> int:
    """Pairs per step. `auto` [ours]: the power of two, from 64 to 1024, nearest to eight steps an epoch: small
    collections need the steps, and Sinkhorn-Knopp wants batches in which every cluster shows up."""
    if batch_size != "auto":
        return batch_size
    return int(2 ** np.clip(np.round(np.log2(num_images / STEPS_PER_EPOCH)), 6, 10))


def num_steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Steps that visit every image once, in batches of nearly equal size, as near to `batch_size` as can be."""
    return max(1, round(num_images / batch_size))


def epoch_batches(
    graph: NeighborGraph, batch_size: int, num_positives: int, seed: int, epoch: int, rank: int, num_workers: int
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """This worker's share of every batch of an epoch.

    Yields:
        rows (1 + num_positives, b) int64, the images and, below each, its drawn neighbours; and the size of the global
        batch. Batches are of nearly equal size: with a small last batch BatchNorm and Sinkhorn-Knopp would see too few.
    """
    anchors = graph.anchors
    num_images = len(anchors)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    order = anchors[generator.permutation(num_images)]
    draws = generator.random((num_positives, num_images), dtype=np.float32)
    for batch in np.array_split(np.arange(num_images), num_steps_per_epoch(num_images, batch_size)):
        share = np.array_split(batch, num_workers)[rank]
        images = order[share]
        starts = np.asarray(graph.indptr[images])
        degrees = np.asarray(graph.indptr[images + 1]) - starts
        # The product may round up to the degree itself in float32.
        offsets = np.minimum((draws[:, share] * degrees).astype(np.int64), degrees - 1)
        neighbors = np.asarray(graph.indices[starts + offsets], dtype=np.int64)
        yield np.concatenate([images[np.newaxis], neighbors]), len(batch)
