"""The objective of stage 1 (METHOD section 2): TEMI's weighted pointwise mutual information and ICCE's pseudo-label
cross-entropy.

V = 2 views (an image and its neighbour), H heads, B pairs of this worker, K clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from icce_ray.config import HeadsConfig
from icce_ray.heads.communicator import Communicator
from icce_ray.heads.sinkhorn import sinkhorn_log_targets


@dataclass
class PairLosses:
    """Per head, summed over this worker's pairs; float32 (H,)."""

    temi_H: torch.Tensor
    cross_entropy_H: torch.Tensor


def teacher_log_targets(logits_VHBK: torch.Tensor, config: HeadsConfig, communicator: Communicator) -> torch.Tensor:
    """Log of the teacher's distribution per view, head and image: Sinkhorn-Knopp over the global batch of each view
    (ICCE), or a plain softmax (TEMI). Float32, same shape; one view or more."""
    if config.sinkhorn:
        return sinkhorn_log_targets(logits_VHBK, config.teacher_temperature, config.sinkhorn_iterations, communicator)
    return torch.log_softmax(logits_VHBK / config.teacher_temperature, dim=-1)


def pair_agreement(targets_VHBK: torch.Tensor) -> torch.Tensor:
    """Sum over heads of the probability that both views fall into the same cluster, (B,). The weight of a pair is its
    mean over all heads."""
    return (targets_VHBK[0] * targets_VHBK[1]).sum(dim=(0, 2))


def pair_losses(
    student_logits_VHBK: torch.Tensor,
    teacher_log_VHBK: torch.Tensor,
    log_prior_HK: torch.Tensor,
    weight_B: torch.Tensor,
    config: HeadsConfig,
    ce_weight: float,
) -> PairLosses:
    """Losses of each head.

    Args:
        student_logits_VHBK: cosines of the two views, float32.
        teacher_log_VHBK: log targets of the two views.
        log_prior_HK: log of the cluster prior.
        weight_B: weight of each pair.
        config: temperatures and beta.
        ce_weight: the present weight of the cross-entropy; at 0 it is not computed.
    """
    student_log = torch.log_softmax(student_logits_VHBK / config.student_temperature, dim=-1)
    # Each view's student is compared with the other view's teacher.
    other_teacher_log = teacher_log_VHBK.flip(0)
    shared = config.beta * (student_log + other_teacher_log) - log_prior_HK.unsqueeze(1)
    temi_HB = -0.5 * weight_B * torch.logsumexp(shared, dim=-1).sum(dim=0)
    if ce_weight > 0.0:
        pseudo_label = other_teacher_log.argmax(dim=-1, keepdim=True)
        cross_entropy_HB = -0.5 * student_log.gather(-1, pseudo_label).squeeze(-1).sum(dim=0)
    else:
        cross_entropy_HB = torch.zeros_like(temi_HB)
    return PairLosses(temi_HB.sum(dim=-1), cross_entropy_HB.sum(dim=-1))


def ce_weight_at(epoch: float, config: HeadsConfig) -> float:
    """lambda(t) = lambda_max (1 - cos(pi t / T)) / 2."""
    return config.max_ce_weight * (1.0 - math.cos(math.pi * epoch / config.num_epochs)) / 2.0
