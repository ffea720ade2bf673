"""The training state of some heads: student, teacher, optimiser, prior and balance."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.model import HeadParameters
from icce_ray.methods.heads.optimizer import Moments


@dataclass
class HeadState:
    """Tensors with heads as their first dimension, changed in place."""

    student: HeadParameters
    teacher: HeadParameters
    moments: Moments
    prior_HK: torch.Tensor
    balance_H: torch.Tensor

    @classmethod
    def initialise(
        cls, settings: HeadsConfig, heads: range, dim: int, num_clusters: int, seed: int, device: torch.device
    ) -> HeadState:
        """The state before the first step."""
        num_inputs = settings.num_inputs(dim)
        student = HeadParameters.initialise(
            heads, num_inputs, settings.hidden_dim, settings.bottleneck_dim, num_clusters, seed, num_inputs / dim
        ).map(lambda tensor: tensor.to(device))
        return cls(
            student=student,
            teacher=student.map(torch.clone),
            moments=Moments(student.map(torch.zeros_like), student.map(torch.zeros_like)),
            prior_HK=torch.full((len(heads), num_clusters), 1.0 / num_clusters, device=device),
            balance_H=torch.full((len(heads),), 1.0 if settings.balance == "auto" else settings.balance, device=device),
        )

    def heads(self, heads: slice) -> HeadState:
        """Views of some of the heads."""
        moments = Moments(self.moments.mean.heads(heads), self.moments.square.heads(heads))
        return HeadState(
            self.student.heads(heads), self.teacher.heads(heads), moments, self.prior_HK[heads], self.balance_H[heads]
        )

    def named(self) -> dict[str, torch.Tensor]:
        """The tensors by their names in a checkpoint."""
        owners = {
            "student": self.student, "teacher": self.teacher, "moments.mean": self.moments.mean,
            "moments.square": self.moments.square,
        }  # fmt: skip
        named = {f"{owner}.{name}": tensor for owner, part in owners.items() for name, tensor in part.named().items()}
        return named | {"prior_HK": self.prior_HK, "balance_H": self.balance_H}
