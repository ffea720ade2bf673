"""Preparation of the features for k-means: centring, PCA, unit length, and rounding to a grid on which sums are exact
(docs/METHOD.md, "K-means").

Mean and covariance come from sums over fixed parts of the images, added in the order of the parts, so they don't depend
on how the parts are divided over workers.

Legend: N images, n some of them, D feature dimension, d components.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.errors import InputError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Features = npt.NDArray[np.floating[Any]]

MAX_PARTS = 256
MIN_PART_ROWS = 256
MAX_PRODUCTS = 2**26
"""Numbers that the covariance sums of all parts may hold together: few parts if there are many dimensions."""
ELEMENTS_AT_A_TIME = 2**21
DOUBLE_BITS = 53


@dataclass(frozen=True)
class Moments:
    """Sums over the rows of one part, after subtracting `shift`."""

    sum_D: Doubles
    products_DD: Doubles | None
    """Sum of the outer products; None if only the mean is wanted."""
    longest: float
    """Largest norm of a row."""


@dataclass(frozen=True)
class Projection:
    """A map from features (n, D) to rows (n, d) float32."""

    mean_D: Doubles
    components_Dd: Doubles | None
    """Principal directions; None: all of them are kept, and the rotation is left out, since it changes no distance."""
    spherical: bool
    grid: float
    """A power of two; every coordinate is a multiple of it."""

    @property
    def dim(self) -> int:
        return len(self.mean_D) if self.components_Dd is None else self.components_Dd.shape[1]

    def __call__(self, features_nD: Features) -> Floats:
        rows_nd = features_nD.astype(np.float64)
        rows_nd -= self.mean_D
        if self.components_Dd is not None:
            rows_nd = rows_nd @ self.components_Dd
        if self.spherical:
            length_n1 = np.linalg.norm(rows_nd, axis=1, keepdims=True)
            rows_nd /= np.where(length_n1 == 0.0, 1.0, length_n1)
        rows_nd *= 1.0 / self.grid
        np.rint(rows_nd, out=rows_nd)
        rows_nd *= self.grid
        return rows_nd.astype(np.float32)

    def restore(self, rows_nd: npt.NDArray[Any]) -> Doubles:
        """The features (n, D) whose rows are the given ones; the components that were left out are those of the
        mean."""
        rotated_nD = rows_nd if self.components_Dd is None else rows_nd @ self.components_Dd.T
        return np.asarray(rotated_nD + self.mean_D, dtype=np.float64)

    def to_bytes(self, **more: npt.NDArray[Any]) -> bytes:
        """As an .npz file, with `more` arrays in it. `components` is empty if all are kept."""
        components = np.empty((0, 0)) if self.components_Dd is None else self.components_Dd
        sink = io.BytesIO()
        np.savez(
            sink, mean=self.mean_D, components=components, spherical=self.spherical, grid=self.grid, allow_pickle=False,
            **more,
        )  # fmt: skip
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Projection:
        with np.load(io.BytesIO(data), allow_pickle=False) as saved:
            components = saved["components"]
            return cls(
                saved["mean"], components if components.size else None, bool(saved["spherical"]), float(saved["grid"])
            )


def part_bounds(num_images: int, dim: int, with_products: bool) -> list[tuple[int, int]]:
    """(start, stop) of the fixed parts whose moments are added."""
    num_parts = min(MAX_PARTS, max(1, num_images // MIN_PART_ROWS))
    if with_products:
        num_parts = max(1, min(num_parts, MAX_PRODUCTS // dim**2))
    ends = [num_images * number // num_parts for number in range(num_parts + 1)]
    return list(pairwise(ends))


def read_rows(features_ND: Features, start: int, stop: int) -> Features:
    """The rows start..stop-1. Those of a memory map are read from its file: pages of the map that were touched would
    count as this process's memory for as long as it lives."""
    if not isinstance(features_ND, np.memmap) or features_ND.filename is None:
        return features_ND[start:stop]
    dim, stop = features_ND.shape[1], min(stop, len(features_ND))
    offset = features_ND.offset + start * dim * features_ND.itemsize
    rows_nD: Features = np.fromfile(features_ND.filename, features_ND.dtype, (stop - start) * dim, offset=offset)
    return rows_nD.reshape(stop - start, dim)


def shift_of(features_ND: Features) -> Doubles:
    """A point near the features, the mean of the first rows: moments about it lose no digits."""
    shift_D = read_rows(features_ND, 0, MIN_PART_ROWS).astype(np.float64).mean(axis=0)
    return np.where(np.isfinite(shift_D), shift_D, 0.0)


def measure(features_ND: Features, start: int, stop: int, with_products: bool) -> Moments:
    """The moments of the rows start..stop-1 about :func:`shift_of` the features. Raises InputError: a row is not
    finite."""
    dim = features_ND.shape[1]
    shift_D, sum_D, longest = shift_of(features_ND), np.zeros(dim), 0.0
    products_DD = np.zeros((dim, dim)) if with_products else None
    step = max(1, ELEMENTS_AT_A_TIME // dim)
    for first in range(start, stop, step):
        rows_nD = read_rows(features_ND, first, min(first + step, stop)).astype(np.float64)
        rows_nD -= shift_D
        squares_n = np.einsum("nd,nd->n", rows_nD, rows_nD)
        if not np.isfinite(squares_n).all():
            row = first + int(np.argmin(np.isfinite(squares_n)))
            raise InputError(f"the feature of row {row} is not finite (NaN or infinite); remove or embed it again")
        sum_D += rows_nD.sum(axis=0)
        longest = max(longest, math.sqrt(squares_n.max()))
        if products_DD is not None:
            products_DD += rows_nD.T @ rows_nD
    return Moments(sum_D, products_DD, longest)


def make_projection(
    parts: Sequence[Moments], shift_D: Doubles, num_images: int, num_components: int | None, spherical: bool
) -> Projection:
    """The projection of features with these moments about `shift_D`, in the order of the parts, to `num_components`
    principal components; None: all. Raises InputError: more components than dimensions."""
    dim = len(shift_D)
    if num_components is not None and num_components > dim:
        raise InputError(f"kmeans.num_components is {num_components}, but the features have {dim} dimensions")
    offset_D = np.sum([part.sum_D for part in parts], axis=0) / num_images
    longest = max(part.longest for part in parts) + float(np.linalg.norm(offset_D))
    components_Dd: Doubles | None = None
    if num_components is not None:
        products_DD = np.zeros((dim, dim))
        for part in parts:
            assert part.products_DD is not None
            products_DD += part.products_DD
        covariance_DD = products_DD / num_images - np.outer(offset_D, offset_D)
        _, vectors_DD = np.linalg.eigh(covariance_DD)
        components_Dd = vectors_DD[:, ::-1][:, :num_components]
        largest_d = components_Dd[np.abs(components_Dd).argmax(axis=0), np.arange(num_components)]
        components_Dd = np.ascontiguousarray(components_Dd * np.where(largest_d < 0, -1.0, 1.0))
    return Projection(shift_D + offset_D, components_Dd, spherical, _grid(1.0 if spherical else longest, num_images))


def _grid(largest: float, num_rows: int) -> float:
    """The finest power of two of which a float64 still holds the sum of `num_rows` numbers up to `largest` exactly."""
    if largest == 0.0:
        return 1.0
    bits = DOUBLE_BITS - 1 - math.ceil(math.log2(num_rows + 1))
    return 2.0 ** (math.ceil(math.log2(largest)) - bits)
