"""What stage 1 leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.methods.heads.model import HeadParameters


@dataclass
class TrainedHeads:
    """Trained heads and their labels."""

    label_matrix_HN: npt.NDArray[np.int32]
    """Every head's cluster of every image."""
    head_losses_H: npt.NDArray[np.float64]
    """Mean loss of the last epoch; the best head has the lowest."""
    parameters: HeadParameters
    """Of the heads that gave the labels."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Per epoch: losses, learning rate, weight of the cross-entropy, what EpochWatch saw, pairs per second."""
    stopped_early: bool = False
    """The labels had stopped moving before the last epoch."""

    collapsed_heads: list[int] = field(default_factory=list)
    """Heads that were trained and left out of all of the above: see :func:`find_collapsed_heads`."""

    def without_collapsed_heads(self) -> TrainedHeads:
        """The heads that are of use to a consensus; all of them where every one has collapsed."""
        collapsed = find_collapsed_heads(self.label_matrix_HN, self.parameters.num_clusters)
        kept = [head for head in range(len(self.head_losses_H)) if head not in set(collapsed)]
        if not collapsed or not kept:
            return self
        return replace(
            self,
            label_matrix_HN=self.label_matrix_HN[kept],
            head_losses_H=self.head_losses_H[kept],
            parameters=self.parameters.map(lambda tensor: tensor[kept]),
            collapsed_heads=collapsed,
        )

    def summary(self) -> dict[str, Any]:
        """Figures for the manifest and the log."""
        seconds = [epoch["seconds"] for epoch in self.history]
        return {
            "num_heads": len(self.head_losses_H),
            "num_epochs": len(self.history),
            "stopped_early": self.stopped_early,
            "loss": float(self.head_losses_H.mean()),
            "best_head": int(self.head_losses_H.argmin()),
            "best_head_loss": float(self.head_losses_H.min()),
            "collapsed_heads": self.collapsed_heads,
            "label_change": self.history[-1]["label_change"] if self.history else None,
            "seconds_per_epoch": round(sum(seconds) / max(1, len(seconds)), 4),
        }


def find_collapsed_heads(label_matrix_HN: npt.NDArray[np.integer[Any]], num_clusters: int) -> list[int]:
    """Heads that use fewer than half of the clusters that they could, or fewer than two [ours]."""
    smallest = max(2, min(num_clusters, label_matrix_HN.shape[1]) / 2)
    return [head for head, labels_N in enumerate(label_matrix_HN) if len(np.unique(labels_N)) < smallest]
