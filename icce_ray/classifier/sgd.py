"""SGD for a whole grid of learning rates: one linear classifier per rate, trained side by side on the same batches.

The features are read once, and the products of the whole grid are one matrix product: logits_BGK = x_BD @ W_D(GK).
Weights start at 0: the problem is convex, so nothing but the batches depends on a random draw.

Shapes: N images, D dimensions, K clusters, G learning rates, B batch.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.integer]

FLOPS_PER_THREAD = 1e8
"""FLOP of a step that are worth a thread. With fewer, threads cost more than they gain: on a busy machine a step takes
twenty times as long."""
DIVERGENCE_CHECK_STEPS = 250
PROGRESS_STEPS = 50


class Grid(NamedTuple):
    """The G classifiers that did not diverge, in the order of the learning rates."""

    positions: list[int]
    """Their positions among the given learning rates."""
    weights: npt.NDArray[np.float32]
    """(G, D, K)."""
    biases: npt.NDArray[np.float32]
    """(G, K)."""


def batches(num_images: int, batch_size: int, num_steps: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the rows of each step, (B,) int64: seeded shuffles of all images, end to end. A batch may span two."""
    rng = np.random.default_rng(seed)
    pending = np.empty(0, dtype=np.int64)
    for _ in range(num_steps):
        while len(pending) < batch_size:
            pending = np.concatenate([pending, rng.permutation(num_images)])
        yield pending[:batch_size]
        pending = pending[batch_size:]


def train_grid(
    read_rows: Callable[[IntArray], npt.NDArray[np.float32]],
    labels_N: IntArray,
    *,
    num_clusters: int,
    num_dims: int,
    learning_rates: tuple[float, ...],
    momentum: float,
    batch_size: int,
    num_steps: int,
    seed: int,
    device: str = "cpu",
    on_step: Callable[[int, int], object] = lambda done, total: None,
) -> Grid:
    """Minimise the mean cross-entropy by SGD with momentum, once per learning rate. Returns the classifiers whose
    weights stayed finite, possibly none. `read_rows` returns the (B, D) float32 features of the given rows, centred and
    scaled. Learning rates are for 256 images: they are multiplied by B / 256, and fall to 0 by a half cosine. `on_step`
    is called with (done, total) from time to time."""
    rates = np.asarray(learning_rates, dtype=np.float64) * batch_size / 256
    alive = np.arange(len(rates))
    shape = (num_dims + 1, len(rates) * num_clusters)
    # The last row is the bias; the features get a column of ones.
    weights = torch.zeros(shape, device=device)
    velocity = torch.zeros(shape, device=device)
    rate_row = _per_column(rates, num_clusters, device)
    targets = torch.from_numpy(np.asarray(labels_N, dtype=np.int64)).to(device)
    x = torch.ones((batch_size, num_dims + 1), device=device)
    flops_per_step = 4.0 * batch_size * num_dims * num_clusters * len(rates)
    with _at_most_threads(max(1, int(flops_per_step / FLOPS_PER_THREAD))):
        for step, rows in enumerate(batches(len(labels_N), batch_size, num_steps, seed)):
            x[:, :-1] = torch.from_numpy(read_rows(rows)).to(device)
            logits = (x @ weights).view(batch_size, len(alive), num_clusters)
            slope = torch.softmax(logits, dim=2)
            slope[torch.arange(batch_size, device=device), :, targets[torch.from_numpy(rows).to(device)]] -= 1.0
            velocity.mul_(momentum).addmm_(x.T, slope.view(batch_size, -1), alpha=1.0 / batch_size)
            cosine = (1.0 + math.cos(math.pi * step / num_steps)) / 2.0
            weights.addcmul_(velocity, rate_row, value=-cosine)
            if (step + 1) % DIVERGENCE_CHECK_STEPS == 0 or step + 1 == num_steps:
                finite = torch.isfinite(weights).view(-1, len(alive), num_clusters).all(2).all(0)
                if not bool(finite.all()):
                    columns = finite.repeat_interleave(num_clusters)
                    weights, velocity = weights[:, columns].contiguous(), velocity[:, columns].contiguous()
                    alive = alive[finite.cpu().numpy()]
                    rate_row = _per_column(rates[alive], num_clusters, device)
                if not len(alive):
                    break
            if (step + 1) % PROGRESS_STEPS == 0:
                on_step(step + 1, num_steps)
    solved = weights.cpu().numpy().reshape(num_dims + 1, len(alive), num_clusters).transpose(1, 0, 2)
    return Grid(alive.tolist(), np.ascontiguousarray(solved[:, :-1]), np.ascontiguousarray(solved[:, -1]))


@contextmanager
def _at_most_threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, num_threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _per_column(rates: npt.NDArray[np.float64], num_clusters: int, device: str) -> torch.Tensor:
    return torch.from_numpy(np.repeat(rates, num_clusters).astype(np.float32)).to(device)
