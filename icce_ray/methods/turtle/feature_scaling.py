"""Features in the scale that TURTLE's inner classifiers need, and the labels of features as they are
(docs/METHOD.md, "TURTLE")."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.methods.heads.inputs import random_rotation
from icce_ray.methods.turtle.bilevel_step import Layers
from icce_ray.runtime.threads import ThreadPool

ROWS_AT_ONCE = 4096
"""A block of rows is summed by one thread, and the blocks in their order, so threads don't change a bit."""
MIN_VARIANCE = 1e-30
"""Features that are all equal become 0."""


@dataclass(frozen=True)
class Space:
    """The features of one space on the device, and how they were made."""

    features_ND: torch.Tensor
    mean_D: torch.Tensor
    mix_DD: torch.Tensor | None
    """They are ``(given - mean_D) @ mix_DD``; as given if it is None."""

    def layer_on_given(self, layer_EC: torch.Tensor) -> torch.Tensor:
        """The layer on the features as they were given that does what this layer does on the prepared ones."""
        if self.mix_DD is None:
            return layer_EC
        given_DC = self.mix_DD @ layer_EC[:-1]
        return torch.cat([given_DC, layer_EC[-1:] - self.mean_D @ given_DC])


def prepare_features(
    features_ND: npt.NDArray[Any], *, scale: bool, seed: int, dtype: torch.dtype, device: torch.device, pool: ThreadPool
) -> Space:
    """Put the features, float16 or float32, which may be memory-mapped, on the device as `dtype`. `scale`: centre them,
    rotate them at random, and divide all by one number, so that the mean variance is 1."""
    num_rows, dim = features_ND.shape
    prepared_ND = torch.empty((num_rows, dim), dtype=dtype, device=device)
    starts = range(0, num_rows, ROWS_AT_ONCE)

    def read(start: int) -> torch.Tensor:
        return read_rows(features_ND, start, device)

    mean_D, mix_DD = torch.zeros(dim, device=device), None
    if scale:
        sums = pool.map(lambda start: read(start).sum(dim=0, dtype=torch.float64), starts)
        mean_D = (reduce(torch.add, sums) / num_rows).float()
        squares = pool.map(lambda start: (read(start) - mean_D).square().sum(dtype=torch.float64), starts)
        variance = float(reduce(torch.add, squares)) / features_ND.size
        mix_DD = random_rotation(dim, seed).to(device) / max(variance, MIN_VARIANCE) ** 0.5

    def fill(start: int) -> None:
        rows_nD = read(start)
        prepared_ND[start : start + len(rows_nD)] = rows_nD if mix_DD is None else (rows_nD - mean_D) @ mix_DD

    pool.map(fill, starts)
    return Space(prepared_ND, mean_D, mix_DD)


def label_rows(
    sets: Sequence[npt.NDArray[Any]], layers: Layers, num_clusters: int, *, device: torch.device, pool: ThreadPool
) -> npt.NDArray[np.int32]:
    """The most likely cluster of each row by each run, (R, N). The feature sets are as they were given, (N, D) each,
    and so are the layers on them, from :meth:`Space.layer_on_given`."""

    def label(start: int) -> torch.Tensor:
        spaces = []
        for features_ND, layer_EC in zip(sets, layers, strict=True):
            logits_nC = read_rows(features_ND, start, device) @ layer_EC[:-1] + layer_EC[-1]
            spaces.append(torch.softmax(logits_nC.view(len(logits_nC), -1, num_clusters), dim=2))
        return reduce(torch.add, spaces).argmax(dim=2).t().cpu()

    labels_RN = torch.cat(pool.map(label, range(0, len(sets[0]), ROWS_AT_ONCE)), dim=1)
    return labels_RN.numpy().astype(np.int32)


def read_rows(features_ND: npt.NDArray[Any], start: int, device: torch.device) -> torch.Tensor:
    """ROWS_AT_ONCE rows from `start` on, or those that are left, float32."""
    block = np.array(features_ND[start : start + ROWS_AT_ONCE], dtype=np.float32)
    return torch.from_numpy(block).to(device)
