"""Features prepared for cosine similarity: centred, scaled to unit length, some rows at a time.

A prepared row depends only on its feature and on the mean, so shards, blocks and single rows give the same bits.

Legend: N images, D feature dimension, n some of the rows, P pairs.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.errors import InputError
from icce_ray.runtime.threads import in_threads, threads_within

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

RESOLUTION = 2.0**-22
"""Unit in which cosines are compared. Cosines that round to the same number of units are ties."""
ELEMENTS_PER_BLOCK = 4_000_000


class UnitFeatures:
    """The rows of a feature matrix, prepared on access: ``unit[start:stop]``, ``unit[ids]``. The matrix (N, D) may be a
    read-only memory map, and is never written to; the mean (D,), if it is given, is subtracted from each row."""

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

    def __getitem__(self, rows: slice | Ids | npt.NDArray[np.int32]) -> Floats:
        """(n, D) float32 of unit length; a feature that is zero (or equals the mean) stays zero."""
        chosen = self.features_ND[rows]
        out = np.empty(chosen.shape, np.float32)
        rows_per_block = max(1, ELEMENTS_PER_BLOCK // chosen.shape[1])
        for start in range(0, len(chosen), rows_per_block):
            out[start : start + rows_per_block] = self._prepare(chosen[start : start + rows_per_block])
        return out

    def _prepare(self, chosen_nD: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        block_nD = chosen_nD.astype(np.float64)
        length_before_n = np.linalg.norm(block_nD, axis=1)
        if self.mean_D is not None:
            block_nD -= self.mean_D
        length_n = np.linalg.norm(block_nD, axis=1)
        # If an image equals the mean, centring leaves rounding errors; normalising these would invent a direction.
        is_zero_n = length_n <= 1e-12 * np.maximum(length_before_n, self.mean_length)
        block_nD /= np.where(is_zero_n, 1.0, length_n)[:, None]
        block_nD[is_zero_n] = 0.0
        return block_nD


def prepare(features_ND: npt.NDArray[np.floating[Any]], center: bool) -> UnitFeatures:
    """Check the features and measure their mean, in float64, if they are to be centred. Raises InputError: not a matrix
    of at least two rows, or a value that is not finite."""
    if features_ND.ndim != 2 or features_ND.shape[0] < 2 or features_ND.shape[1] < 1:
        raise InputError(f"features have the shape {features_ND.shape}; needed: at least 2 images x 1 dimension")
    num_images, dim = features_ND.shape
    rows_per_block = max(1, ELEMENTS_PER_BLOCK // dim)

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
        sum_D += part_D  # in the order of the blocks, for any number of threads
    return UnitFeatures(features_ND, sum_D / num_images if center else None)


def in_units(cosine: float) -> int:
    """A cosine in units of `RESOLUTION`."""
    return round(cosine / RESOLUTION)


def exact_similarity(
    queries_QD: Floats | UnitFeatures, rows_P: Ids | npt.NDArray[np.int32], base: Floats | UnitFeatures, columns_P: Ids
) -> Ids:
    """Cosine of each pair of a row of `queries_QD` and a row of `base`, summed in float64, in units of `RESOLUTION`:
    (P,) int64."""
    units_P = np.empty(len(rows_P), np.int64)
    step = max(1, ELEMENTS_PER_BLOCK // base.shape[1])
    for start in range(0, len(rows_P), step):
        block = slice(start, start + step)
        left = queries_QD[rows_P[block]].astype(np.float64)
        left *= base[columns_P[block]]
        units_P[block] = np.rint(left.sum(axis=1) / RESOLUTION)
    return units_P
