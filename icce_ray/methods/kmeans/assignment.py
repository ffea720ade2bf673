"""The nearest centroid of each row, and the sums of the rows of each cluster.

The product of the rows with the centroids is numpy's on a CPU. On the machine this was written on, FAISS's assignment
takes four times as long.

Legend: n rows, d dimensions, K clusters, U clusters that some row is in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from icce_ray.methods.kmeans.projection import Doubles, Floats

if TYPE_CHECKING:
    import torch

Labels = npt.NDArray[np.int32]

SCORES_AT_A_TIME, SCORES_AT_A_TIME_ON_GPU = 2**20, 2**27
MAX_HELD_SHARE = 0.7
"""Share of a device's free memory that the rows may take; otherwise they are copied there in each pass."""


@dataclass
class Sums:
    """Sum and number of the rows of each cluster. The rows lie on a grid, so sums are exact and can be added in any
    order (docs/METHOD.md, "K-means")."""

    rows_Kd: Doubles
    counts_K: npt.NDArray[np.int64]

    @classmethod
    def zeros(cls, num_clusters: int, dim: int) -> Sums:
        return cls(np.zeros((num_clusters, dim)), np.zeros(num_clusters, np.int64))

    @classmethod
    def join(cls, parts: Sequence[Sums]) -> Sums:
        total = cls(parts[0].rows_Kd.copy(), parts[0].counts_K.copy())
        for part in parts[1:]:
            total.rows_Kd += part.rows_Kd
            total.counts_K += part.counts_K
        return total

    def add(self, rows_nd: Floats, labels_n: Labels) -> None:
        used_U, place_n, counts_U = np.unique(labels_n, return_inverse=True, return_counts=True)
        size = len(rows_nd)
        member_Un = sp.csc_array((np.ones(size), place_n, np.arange(size + 1)), shape=(len(used_U), size))
        self.rows_Kd[used_U] += member_Un @ rows_nd.astype(np.float64)
        self.counts_K[used_U] += counts_U


def nearest(rows_nd: Floats, centroids_Kd: Floats) -> Labels:
    """The nearest centroid of each row (n,); of equally near ones the lowest number."""
    half_K = np.einsum("kd,kd->k", centroids_Kd, centroids_Kd, dtype=np.float64).astype(np.float32) / 2
    labels_n = np.empty(len(rows_nd), np.int32)
    step = max(1, SCORES_AT_A_TIME // len(centroids_Kd))
    for start in range(0, len(rows_nd), step):
        scores_sK = rows_nd[start : start + step] @ centroids_Kd.T
        scores_sK -= half_K
        labels_n[start : start + step] = scores_sK.argmax(axis=1)
    return labels_n


def squared_distances(rows_nd: Floats, centroids_Kd: Floats, labels_n: Labels) -> Doubles:
    """Squared distance of each row from the centroid of its cluster (n,), in float64."""
    difference_nd = rows_nd.astype(np.float64) - centroids_Kd[labels_n]
    distances_n: Doubles = np.einsum("nd,nd->n", difference_nd, difference_nd)
    return distances_n


class TorchAssigner:
    """Assigns blocks of rows on a GPU. Blocks that were there once stay if there is room.

    Products are float32. Sums are exact, so the order in which the device adds them doesn't matter. Labels may differ
    from those of a CPU where two centroids are equally near up to the rounding of float32.
    """

    def __init__(self, device: str) -> None:
        import torch  # takes seconds

        self.device = torch.device(device)
        self._held: dict[int, torch.Tensor] = {}
        self._room = 0
        if self.device.type == "cuda":
            self._room = int(MAX_HELD_SHARE * torch.cuda.mem_get_info(self.device)[0])

    def assign(self, blocks: Iterable[tuple[int, Floats]], centroids_Kd: Floats) -> tuple[list[Labels], Sums]:
        """Labels of each block (its number and rows), and the sums of all."""
        import torch

        centroids = torch.from_numpy(centroids_Kd).to(self.device)
        half_K = centroids.double().square().sum(dim=1).float() / 2
        sums = torch.zeros(centroids.shape, dtype=torch.float64, device=self.device)
        counts_K = torch.zeros(len(centroids), dtype=torch.int64, device=self.device)
        labels: list[Labels] = []
        step = max(1, SCORES_AT_A_TIME_ON_GPU // len(centroids))
        for number, rows_nd in blocks:
            rows = self._on_device(number, rows_nd)
            pieces = [(piece @ centroids.T).sub_(half_K).argmax(dim=1) for piece in torch.split(rows, step)]
            labels_n = torch.cat(pieces)
            sums.index_add_(0, labels_n, rows.double())
            counts_K += torch.bincount(labels_n, minlength=len(centroids))
            labels.append(labels_n.int().cpu().numpy())
        return labels, Sums(sums.cpu().numpy(), counts_K.cpu().numpy())

    def _on_device(self, number: int, rows_nd: Floats) -> torch.Tensor:
        import torch

        if number not in self._held:
            rows = torch.tensor(rows_nd, device=self.device)
            if rows_nd.nbytes > self._room:
                return rows
            self._room -= rows_nd.nbytes
            self._held[number] = rows
        return self._held[number]
