"""The pairs of images that each step trains on. They follow from the seed and the epoch alone, so that every worker
draws the same batches, and a resumed run the same as an undisturbed one."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from icce_ray.neighbors.graph import NeighborGraph

STEPS_PER_EPOCH = 8


def choose_batch_size(num_images: int, batch_size: int | Literal["auto"]) -> int:
    """Pairs per step. `auto` [ours]: the power of two from 64 to 1024 that is nearest to eight steps an epoch. Small
    collections need the steps, and Sinkhorn-Knopp needs batches that contain every cluster."""
    if batch_size != "auto":
        return batch_size
    return int(2 ** np.clip(np.round(np.log2(num_images / STEPS_PER_EPOCH)), 6, 10))


def num_steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Number of steps that visit every image once, in batches of nearly equal size close to `batch_size`."""
    return max(1, round(num_images / batch_size))


def epoch_batches(
    graph: NeighborGraph, batch_size: int, num_positives: int, seed: int, epoch: int
) -> Iterator[npt.NDArray[np.int64]]:
    """The batches of an epoch: every image that has neighbours once, in random order.

    Batches are of nearly equal size: with a small last batch, batch normalisation and Sinkhorn-Knopp would see too few
    images. Yields rows (1 + num_positives, B) int64: the images and, below each, the neighbours drawn for it.
    """
    anchors = graph.anchors
    num_images = len(anchors)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    order = anchors[generator.permutation(num_images)]
    draws = generator.random((num_positives, num_images), dtype=np.float32)
    for batch in np.array_split(np.arange(num_images), num_steps_per_epoch(num_images, batch_size)):
        images = order[batch]
        starts = np.asarray(graph.indptr[images])
        degrees = np.asarray(graph.indptr[images + 1]) - starts
        # In float32 the product may round up to the degree itself.
        offsets = np.minimum((draws[:, batch] * degrees).astype(np.int64), degrees - 1)
        neighbors = np.asarray(graph.indices[starts + offsets], dtype=np.int64)
        yield np.concatenate([images[np.newaxis], neighbors])
