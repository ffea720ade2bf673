"""A label matrix on storage: the heads of one run or of several runs over the same images, one below the other. It is
memory-mapped and read part by part: no process holds all of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.label_matrix import (
    HeadLabels,
    Heads,
    Images,
    Survey,
    check_matrix,
    check_surveys,
    encode_labels,
    survey,
)
from icce_ray.errors import InputError
from icce_ray.methods.clusterings import LABELS_NAME
from icce_ray.store import Artifact


@dataclass(frozen=True)
class StoredHeads(Heads):
    """The heads of `runs`, the clusterings of one run each. Pickles: workers open the files themselves."""

    runs: tuple[Artifact, ...]
    order: tuple[tuple[int, int], ...]
    """(run, row) of each head."""
    values: tuple[npt.NDArray[np.int64], ...]
    unlabelled: Images

    @property
    def num_images(self) -> int:
        return _shape(self.runs[0])[1] - len(self.unlabelled)

    def read(self, start: int, stop: int, heads: slice = slice(None)) -> HeadLabels:
        first, end, _ = heads.indices(self.num_heads)
        values = self.values[first:end]
        # Where these images are in the matrix.
        before = np.searchsorted(self.unlabelled - np.arange(len(self.unlabelled)), [start, stop - 1], side="right")
        left_out = self.unlabelled[slice(*before)] - start - before[0]
        rows = self.rows(start + int(before[0]), stop + int(before[1]), first, end)
        codes = [encode_labels(np.delete(row, left_out), used) for row, used in zip(rows, values, strict=True)]
        return HeadLabels(np.stack(codes), values)

    def labels_of(self, head: int) -> npt.NDArray[Any]:
        return self.rows(0, self.num_images, head, head + 1)[0]

    def select(self, heads: Sequence[int]) -> Self:
        order = tuple(self.order[head] for head in heads)
        return replace(self, order=order, values=tuple(self.values[head] for head in heads))

    def rows(self, start: int, stop: int, first: int, end: int) -> list[npt.NDArray[Any]]:
        """The labels as they are stored, of the images start..stop-1 by the heads first..end-1."""
        wanted = self.order[first:end]
        matrices = {run: self.runs[run].read_array(LABELS_NAME) for run in {run for run, _ in wanted}}
        return [matrices[run][row, start:stop] for run, row in wanted]


def open_heads(runs: list[Artifact], heads_type: Callable[..., StoredHeads] = StoredHeads) -> StoredHeads:
    """The heads of `runs`, made by `heads_type`. Their `map` reads the labels once to check and number them.

    Every run has the same weight: the rows of a run with fewer than another are taken several times. Raises InputError:
    a label matrix that cannot be used, or runs with different numbers of images."""
    shapes = [_shape(run) for run in runs]
    for run, shape in zip(runs, shapes, strict=True):
        check_matrix(shape, np.dtype(run.part(LABELS_NAME).dtype))
    if len({shape[1] for shape in shapes}) > 1:
        counts = ", ".join(f"{shape[1]:,}" for shape in shapes)
        raise InputError(f"consensus.extra_runs: the runs have {counts} images; they must have the same images")
    for run in runs:
        run.read_array(LABELS_NAME)  # checks the checksum here, so that no worker has to
    most = max(shape[0] for shape in shapes)
    order = tuple((run, row % shape[0]) for run, shape in enumerate(shapes) for row in range(most))
    unknown = (np.empty(0, dtype=np.int64),) * len(order)
    heads = heads_type(tuple(runs), order, unknown, unknown[0])
    values, unlabelled = check_surveys(list(heads.map(_survey_part, heads.image_parts())))
    return replace(heads, values=values, unlabelled=unlabelled)


def _survey_part(heads: StoredHeads, start: int, stop: int) -> Survey:
    rows = heads.rows(start, stop, 0, heads.num_heads)
    return survey(np.stack([labels_n.astype(np.int64, copy=False) for labels_n in rows]), start)


def _shape(run: Artifact) -> tuple[int, ...]:
    shape = run.part(LABELS_NAME).shape
    assert shape is not None
    return shape
