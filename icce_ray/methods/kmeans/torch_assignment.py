"""The nearest centroid of each row, and the sums of the rows of each cluster, on a GPU.

Products are float32. Sums are exact, so the order in which the device adds them doesn't matter. Labels may differ from
those of a CPU where two centroids are equally near up to the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from icce_ray.methods.kmeans.assignment import Labels, Sums
from icce_ray.methods.kmeans.projection import Floats

SCORES_AT_A_TIME = 2**27
MAX_HELD_SHARE = 0.7
"""Share of the device's free memory that the rows may take; otherwise they are copied there in each pass."""


class TorchAssigner:
    """Assigns blocks of rows. Blocks that were on the device once stay there if there is room."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._held: dict[int, torch.Tensor] = {}
        self._room = 0
        if self.device.type == "cuda":
            self._room = int(MAX_HELD_SHARE * torch.cuda.mem_get_info(self.device)[0])

    def assign(self, blocks: Iterable[tuple[int, Floats]], centroids_Kd: Floats) -> tuple[list[Labels], Sums]:
        """Labels of each block (its number and rows), and the sums of all."""
        centroids = torch.from_numpy(centroids_Kd).to(self.device)
        half_K = centroids.double().square().sum(dim=1).float() / 2
        sums = torch.zeros(centroids.shape, dtype=torch.float64, device=self.device)
        counts_K = torch.zeros(len(centroids), dtype=torch.int64, device=self.device)
        labels: list[Labels] = []
        step = max(1, SCORES_AT_A_TIME // len(centroids))
        for number, rows_nd in blocks:
            rows = self._on_device(number, rows_nd)
            pieces = [(piece @ centroids.T).sub_(half_K).argmax(dim=1) for piece in torch.split(rows, step)]
            labels_n = torch.cat(pieces)
            sums.index_add_(0, labels_n, rows.double())
            counts_K += torch.bincount(labels_n, minlength=len(centroids))
            labels.append(labels_n.int().cpu().numpy())
        return labels, Sums(sums.cpu().numpy(), counts_K.cpu().numpy())

    def _on_device(self, number: int, rows_nd: Floats) -> torch.Tensor:
        if number not in self._held:
            rows = torch.tensor(rows_nd, device=self.device)
            if rows_nd.nbytes > self._room:
                return rows
            self._room -= rows_nd.nbytes
            self._held[number] = rows
        return self._held[number]
