"""Features made ready for cosine search: centred, scaled to unit length, a block of rows at a time.

A prepared row depends on its feature and the mean only, not on which rows are prepared together: so shards, blocks and
single rows give the same bits, and nobody needs to hold or store all of them.

Legend: N images, D feature dimension, n some of the rows, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.errors import InputError
from icce_ray.runtime.threads import in_threads, threads_within

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

PREPARED_ELEMENTS = 4_000_000


class PreparedFeatures:
    """The rows of a feature matrix, prepared when they are asked for: ``prepared[start:stop]``, ``prepared[ids]``.

    Args:
        features_ND: (N, D) floating point; may be a read-only memory map, never written to.
        mean_D: (D,) float64, subtracted from each row, as `mean_feature` measures it; None: nothing is subtracted.
    """

    def __init__(self, features_ND: npt.NDArray[np.floating[Any]], mean_D: npt.NDArray[np.float64] | None) -> None:
        self.features_ND = np.asarray(features_ND)
        self.mean_D = mean_D
        self.mean_length = 0.0 if mean_D is None else float(np.linalg.norm(mean_D))

    @property
    def shape(self) -> tuple[int, int]:
        num_images, dim = self.features_ND.shape
        return num_images, dim

    def __len__(self) -> int:
        return len(self.features_ND)

    def __getitem__(self, rows: slice | Ids) -> Floats:
        """(n, D) float32 of unit length; a feature that is zero (or equals the mean) stays zero."""
        chosen = self.features_ND[rows]
        out = np.empty(chosen.shape, np.float32)
        rows_per_block = max(1, PREPARED_ELEMENTS // chosen.shape[1])
        for start in range(0, len(chosen), rows_per_block):
            out[start : start + rows_per_block] = self._prepare(chosen[start : start + rows_per_block])
        return out

    def _prepare(self, chosen_nD: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        block_nD = chosen_nD.astype(np.float64)
        length_before_n = np.linalg.norm(block_nD, axis=1)
        if self.mean_D is not None:
            block_nD -= self.mean_D
        length_n = np.linalg.norm(block_nD, axis=1)
        # What centring leaves of an image that equals the mean is rounding: normalising it would invent a direction.
        is_zero_n = length_n <= 1e-12 * np.maximum(length_before_n, self.mean_length)
        block_nD /= np.where(is_zero_n, 1.0, length_n)[:, None]
        block_nD[is_zero_n] = 0.0
        return block_nD


@dataclass(frozen=True)
class Queries:
    """Q images whose neighbours are wanted.

    prepared: the features of all images; ids_Q: the images; excluded_Q: the one image that each must not get, itself
    as a rule.
    """

    prepared: PreparedFeatures
    ids_Q: Ids
    excluded_Q: Ids

    @classmethod
    def of(cls, prepared: PreparedFeatures, ids_Q: Ids, excluded_Q: Ids | None = None) -> Queries:
        return cls(prepared, ids_Q, ids_Q if excluded_Q is None else excluded_Q)

    def __len__(self) -> int:
        return len(self.ids_Q)

    @cached_property
    def features(self) -> Floats:
        """(Q, D). Made when somebody looks: most answers are merged without."""
        return self.prepared[self.ids_Q]

    @cached_property
    def is_zero(self) -> npt.NDArray[np.bool_]:
        """(Q,)"""
        return np.logical_not(self.features.any(axis=1))


def prepare(features_ND: npt.NDArray[np.floating[Any]], center: bool) -> PreparedFeatures:
    """Check the features, and measure their mean if they are to be centred.

    Args:
        features_ND: (N, D) floating point; may be a read-only memory map, never written to.
        center: subtract the mean feature (taken in float64).

    Raises:
        InputError: not a matrix of at least two rows, or a value that is not finite.
    """
    if features_ND.ndim != 2 or features_ND.shape[0] < 2 or features_ND.shape[1] < 1:
        raise InputError(f"features have the shape {features_ND.shape}; needed: at least 2 images x 1 dimension")
    num_images, dim = features_ND.shape
    rows_per_block = max(1, PREPARED_ELEMENTS // dim)

    def sum_of_block(start: int) -> npt.NDArray[np.float64]:
        block = features_ND[start : start + rows_per_block].astype(np.float64)
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise InputError(f"the feature of row {row} is not finite (NaN or infinite); remove or embed it again")
        sum_D: npt.NDArray[np.float64] = block.sum(axis=0)
        return sum_D

    starts = range(0, num_images, rows_per_block)
    sum_D = np.zeros(dim)
    for part_D in in_threads(sum_of_block, starts, threads_within(16 * rows_per_block * dim)):
        sum_D += part_D  # in the order of the blocks, whatever the threads
    return PreparedFeatures(features_ND, sum_D / num_images if center else None)
