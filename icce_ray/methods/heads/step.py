"""One training step of a block of heads (docs/METHOD.md, "Heads").

The weight of a pair is a mean over all heads. So a step has two passes: the teacher's, which gives targets and
agreements, and, once the agreements of all heads are known, the student's. Both are functions of tensors, which
compiled_step.py compiles for GPUs.

V views, H heads of the block, B pairs, K clusters, n = V B rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.inputs import HeadInputs
from icce_ray.methods.heads.loss import icce_losses, scan_losses
from icce_ray.methods.heads.model import HeadParameters, PrototypeDtypes, backward, forward
from icce_ray.methods.heads.optimizer import adamw_update
from icce_ray.methods.heads.state import HeadState
from icce_ray.methods.heads.teacher import (
    log_prior,
    moved_prior,
    pair_agreement,
    smooth_over_neighbors,
    teacher_targets,
)


@dataclass
class Batch:
    """The pairs of a step."""

    rows: npt.NDArray[np.int64]
    """(V, B): the images, and below each the neighbours drawn for it."""
    inputs: HeadInputs
    """The normalised features of the rows, all views below each other."""

    @property
    def num_pairs(self) -> int:
        return int(self.rows.shape[1])


@dataclass(frozen=True)
class StepValues:
    """What changes from step to step."""

    learning_rate: float
    ce_weight: float
    num_updates: dict[str, int]
    """Earlier updates of each parameter that this step moves."""


@dataclass(frozen=True)
class Passes:
    """The passes of a step, compiled or not."""

    teacher: Callable[..., Any]
    student: Callable[..., Any]
    dtypes: PrototypeDtypes


@dataclass
class HeadBlock:
    """Heads that are computed together."""

    state: HeadState
    """Views of the worker's state."""
    heads: slice
    """Their place among the worker's heads."""
    settings: HeadsConfig
    momentum: float
    """The teacher's."""
    passes: Passes
    log_targets_VHBK: torch.Tensor | None = None
    """From the last :meth:`look`."""

    def look(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's pass: keeps the targets for :meth:`train` and moves the prior. Returns the agreement of each
        head with each pair (H, B), and the cluster of each image (H, B)."""
        self.log_targets_VHBK, agreement_HB, prior_HK, labels_HB = self.passes.teacher(
            self.state.teacher, batch.inputs.of(self.heads), len(batch.rows), self.state.prior_HK,
            self.state.balance_H, self.settings, self.passes.dtypes,
        )  # fmt: skip
        self.state.prior_HK.copy_(prior_HK)
        return agreement_HB, labels_HB

    def train(
        self, batch: Batch, weight_B: torch.Tensor | None, values: StepValues
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's pass, the update of its parameters and of the teacher's. Returns the loss summed over pairs
        (H,), and the student's cluster of each image (H, B).

        Args:
            batch: the one that :meth:`look` saw last.
            weight_B: weight of each pair; None with SCAN's loss, which has no teacher.
            values: learning rate and the like.
        """
        device = self.state.prior_HK.device
        loss_H, labels_HB, gradient = self.passes.student(
            self.state.student,
            batch.inputs.of(self.heads, 2 * batch.num_pairs),
            self.log_targets_VHBK,
            self.state.prior_HK,
            weight_B,
            # As tensors, since each value of a number would be compiled for.
            torch.full((), values.ce_weight, device=device),
            torch.full((), 1.0 / (self.settings.num_heads * batch.num_pairs), device=device),
            self.settings,
            self.passes.dtypes,
        )
        adamw_update(
            self.state.student, gradient, self.state.moments, values.num_updates, values.learning_rate,
            self.settings.weight_decay,
        )  # fmt: skip
        torch._foreach_lerp_(self.state.teacher.tensors(), self.state.student.tensors(), 1.0 - self.momentum)
        return loss_H, labels_HB


def teacher_pass(
    teacher: HeadParameters, inputs: torch.Tensor, num_views: int, prior_HK: torch.Tensor,
    balance_H: torch.Tensor, settings: HeadsConfig, dtypes: PrototypeDtypes,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Log targets of an image and its neighbour (2, H, B, K), agreement (H, B), the new prior (H, K), and each image's
    cluster (H, B)."""
    cosines_VHBK = _by_view(forward(teacher, inputs, dtypes).cosines_HnK, num_views)
    labels_HB = cosines_VHBK[0].argmax(dim=-1)
    q_VHBK, log_q_VHBK = teacher_targets(cosines_VHBK, balance_H, settings)
    prior_HK = moved_prior(prior_HK, q_VHBK, settings.prior_momentum)
    q_VHBK, log_q_VHBK = smooth_over_neighbors(q_VHBK, log_q_VHBK)
    return log_q_VHBK, pair_agreement(q_VHBK), prior_HK, labels_HB


def student_pass(
    student: HeadParameters, inputs: torch.Tensor, log_targets_VHBK: torch.Tensor | None, prior_HK: torch.Tensor,
    weight_B: torch.Tensor | None, ce_weight: torch.Tensor, scale: torch.Tensor, settings: HeadsConfig,
    dtypes: PrototypeDtypes,
) -> tuple[torch.Tensor, torch.Tensor, HeadParameters]:  # fmt: skip
    """Loss summed over pairs (H,), cluster of each image (H, B), and `scale` times the gradient of the loss."""
    cache = forward(student, inputs, dtypes)
    cosines_VHBK = _by_view(cache.cosines_HnK, 2)
    if log_targets_VHBK is None or weight_B is None:
        losses = scan_losses(cosines_VHBK, settings)
    else:
        losses = icce_losses(cosines_VHBK, log_targets_VHBK, log_prior(prior_HK), weight_B, ce_weight, settings)
    gradient_HnK = losses.gradient_VHBK.mul_(scale).transpose(0, 1).reshape(cache.cosines_HnK.shape)
    gradient = backward(student, inputs, cache, gradient_HnK, dtypes)
    return losses.loss_H, cosines_VHBK[0].argmax(dim=-1), gradient


def _by_view(cosines_HnK: torch.Tensor, num_views: int) -> torch.Tensor:
    H, n, K = cosines_HnK.shape
    return cosines_HnK.view(H, num_views, n // num_views, K).transpose(0, 1)
