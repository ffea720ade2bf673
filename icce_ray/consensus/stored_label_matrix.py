"""A label matrix on storage: the heads of one run or of several over the same images, one below the other.

It is memory-mapped and numbered piece by piece: no process holds it whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.label_matrix import (
    HeadLabels,
    Heads,
    Survey,
    check_matrix,
    encode_labels,
    survey,
)
from icce_ray.errors import InputError
from icce_ray.store import Artifact

MATRIX_NAME = "label_matrix.npy"


@dataclass(frozen=True)
class StoredHeads(Heads):
    """The heads of `runs`, artifacts with a label matrix each. Pickles: workers open the files themselves.

    Until a survey of the labels has given `values`, one array per head, only :meth:`survey` works.
    """

    runs: tuple[Artifact, ...]
    values: tuple[npt.NDArray[np.int64], ...]

    @property
    def num_images(self) -> int:
        return _shape(self.runs[0])[1]

    def read(self, start: int, stop: int, heads: slice = slice(None)) -> HeadLabels:
        first, end, _ = heads.indices(self.num_heads)
        rows = self._rows(start, stop, first, end)
        values = self.values[first:end]
        codes = [encode_labels(labels_n, used) for labels_n, used in zip(rows, values, strict=True)]
        return HeadLabels(np.stack(codes), values)

    def survey(self, start: int, stop: int) -> Survey:
        """Which labels a stretch of images has."""
        rows = self._rows(start, stop, 0, self.num_heads)
        return survey(np.stack([labels_n.astype(np.int64, copy=False) for labels_n in rows]), start)

    def _rows(self, start: int, stop: int, first: int, end: int) -> list[npt.NDArray[Any]]:
        rows: list[npt.NDArray[Any]] = []
        below = 0
        for run in self.runs:
            num_heads = _shape(run)[0]
            wanted = range(max(first - below, 0), min(end - below, num_heads))
            if wanted:
                matrix = run.read_array(MATRIX_NAME)
                rows += [matrix[head, start:stop] for head in wanted]
            below += num_heads
        return rows


def open_heads(runs: list[Artifact]) -> StoredHeads:
    """The heads of `runs`, not surveyed yet.

    Raises:
        InputError: a matrix that is none, or runs of different numbers of images.
    """
    shapes = [_shape(run) for run in runs]
    for run, shape in zip(runs, shapes, strict=True):
        check_matrix(shape, np.dtype(run.part(MATRIX_NAME).dtype))
    if len({shape[1] for shape in shapes}) > 1:
        counts = ", ".join(f"{shape[1]:,}" for shape in shapes)
        raise InputError(f"consensus.extra_runs: the runs have {counts} images; they must have the same images")
    # Read once here: checked against its checksum, which the workers then need not do.
    for run in runs:
        run.read_array(MATRIX_NAME)
    num_heads = sum(shape[0] for shape in shapes)
    return StoredHeads(tuple(runs), (np.empty(0, dtype=np.int64),) * num_heads)


def _shape(run: Artifact) -> tuple[int, ...]:
    shape = run.part(MATRIX_NAME).shape
    assert shape is not None
    return shape
