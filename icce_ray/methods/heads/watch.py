"""Training metrics of the heads, from the labels that the steps compute anyway."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.methods.heads.inputs import to_device
from icce_ray.metrics.contingency import count_table, nmi_from_counts

MAX_WATCHED_IMAGES = 4096
MAX_HEAD_PAIRS = 16


class EpochWatch:
    """Labels of a seeded sample of the images, and cluster sizes, by one worker's heads.

    Each image of `anchors` is labelled once an epoch, at the step that draws it. That takes no extra forward pass, and
    the labels are half an epoch old on average.
    """

    def __init__(
        self,
        num_images: int,
        anchors: npt.NDArray[np.int64],
        num_heads: int,
        num_clusters: int,
        seed: int,
        device: torch.device,
    ) -> None:
        generator = np.random.default_rng([seed, len(anchors)])
        num_watched = min(len(anchors), MAX_WATCHED_IMAGES)
        watched = generator.choice(anchors, num_watched, replace=False)
        # All other images share one more column. A mask would make a GPU wait.
        column_N = np.full(num_images, num_watched)
        column_N[watched] = np.arange(num_watched)
        self.column_N = torch.from_numpy(column_N).to(device)
        self.labels_Hw = torch.zeros((num_heads, num_watched + 1), dtype=torch.int64, device=device)
        self.sizes_HK = torch.zeros((num_heads, num_clusters), dtype=torch.int64, device=device)
        self.previous_Hw = torch.full((num_heads, num_watched), -1, dtype=torch.int32, device=device)
        """Labels of the last epoch; -1 before the first."""

    def start_epoch(self) -> None:
        self.labels_Hw.zero_()
        self.sizes_HK.zero_()

    def record(self, heads: slice, images: npt.NDArray[np.int64], labels_HB: torch.Tensor) -> None:
        """Note the labels of a step's images by some of the heads."""
        columns = self.column_N[to_device(images, self.column_N.device)]
        self.labels_Hw[heads, columns] = labels_HB
        self.sizes_HK[heads].scatter_add_(1, labels_HB, torch.ones_like(labels_HB))

    def finish_epoch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Number of watched labels that differ from the last epoch's, and number of empty clusters, of each head
        (H,)."""
        labels_Hw = self.labels_Hw[:, :-1].int()
        changed_H = (labels_Hw != self.previous_Hw).sum(dim=1)
        self.previous_Hw = labels_Hw
        return changed_H, (self.sizes_HK == 0).sum(dim=1)


def mean_pairwise_nmi(labels_HN: npt.NDArray[np.integer[Any]]) -> float | None:
    """Mean NMI (geometric) of neighbouring heads, the last with the first, at most 16 pairs; None for one head."""
    num_heads = len(labels_HN)
    if num_heads < 2:
        return None
    num_clusters = int(labels_HN.max()) + 1
    pairs = [(head, (head + 1) % num_heads) for head in range(min(num_heads, MAX_HEAD_PAIRS))]
    tables = [count_table(labels_HN[a], labels_HN[b], num_clusters, num_clusters) for a, b in pairs]
    return float(np.mean([nmi_from_counts(table) for table in tables]))
