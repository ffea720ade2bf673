"""What can be seen of the heads while they train, from the labels that the steps compute anyway."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.methods.heads.communicator import Communicator
from icce_ray.methods.heads.inputs import to_device
from icce_ray.metrics.contingency import count_table
from icce_ray.metrics.nmi import nmi_from_counts

MAX_WATCHED_IMAGES = 4096
MAX_HEAD_PAIRS = 16
NMI_PER_RUN = 20


class EpochWatch:
    """Labels of a seeded sample of the images, and cluster sizes, of one epoch after the other.

    Every image of `anchors` is labelled once an epoch, at the step that draws it: no extra forward pass, and labels
    that are half an epoch old on average.
    """

    def __init__(
        self,
        num_images: int,
        anchors: npt.NDArray[np.int64],
        num_heads: int,
        num_clusters: int,
        num_epochs: int,
        seed: int,
        device: torch.device,
    ) -> None:
        generator = np.random.default_rng([seed, len(anchors)])
        num_watched = min(len(anchors), MAX_WATCHED_IMAGES)
        watched = generator.choice(anchors, num_watched, replace=False)
        # All others share one more column: no mask is needed, which would make a GPU wait.
        column_N = np.full(num_images, num_watched)
        column_N[watched] = np.arange(num_watched)
        self.num_clusters = num_clusters
        self.nmi_interval = max(1, num_epochs // NMI_PER_RUN)
        self.column_N = torch.from_numpy(column_N).to(device)
        self.labels_Hw = torch.zeros((num_heads, num_watched + 1), dtype=torch.int64, device=device)
        self.sizes_HK = torch.zeros((num_heads, num_clusters), dtype=torch.int64, device=device)
        self.previous_Hw: torch.Tensor | None = None

    def start_epoch(self) -> None:
        self.labels_Hw.zero_()
        self.sizes_HK.zero_()

    def record(self, heads: slice, images: npt.NDArray[np.int64], labels_Hb: torch.Tensor) -> None:
        """Labels of this worker's images of a step by some of the heads."""
        columns = self.column_N[to_device(images, self.column_N.device)]
        self.labels_Hw[heads, columns] = labels_Hb
        self.sizes_HK[heads].scatter_add_(1, labels_Hb, torch.ones_like(labels_Hb))

    def finish_epoch(self, epoch: int, communicator: Communicator) -> dict[str, Any]:
        """Figures of the epoch that ends as number `epoch` (from 1): empty_clusters (share, over all heads),
        label_change (share of labels that differ from the epoch before; None after the first), head_nmi (mean NMI of
        pairs of heads; None in most epochs)."""
        labels_Hw = communicator.sum_(self.labels_Hw)[:, :-1].clone()
        sizes_HK = communicator.sum_(self.sizes_HK)
        change = None if self.previous_Hw is None else float((labels_Hw != self.previous_Hw).double().mean())
        self.previous_Hw = labels_Hw
        return {
            "empty_clusters": float((sizes_HK == 0).double().mean()),
            "label_change": change,
            "head_nmi": mean_pairwise_nmi(labels_Hw.cpu().numpy()) if epoch % self.nmi_interval == 0 else None,
        }


def mean_pairwise_nmi(labels_HN: npt.NDArray[np.integer[Any]]) -> float | None:
    """Mean NMI (geometric) of neighbouring heads, the last with the first, at most 16 pairs; None for one head."""
    num_heads = len(labels_HN)
    if num_heads < 2:
        return None
    num_clusters = int(labels_HN.max()) + 1
    pairs = [(head, (head + 1) % num_heads) for head in range(min(num_heads, MAX_HEAD_PAIRS))]
    tables = [count_table(labels_HN[a], labels_HN[b], num_clusters, num_clusters) for a, b in pairs]
    return float(np.mean([nmi_from_counts(table) for table in tables]))
