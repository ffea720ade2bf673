"""The objective of stage 1 (METHOD section 2): TEMI's weighted pointwise mutual information and ICCE's pseudo-label
cross-entropy; or SCAN's loss.

V = 2 views (an image and its neighbour), H heads, B pairs of this worker, K clusters. Each loss comes with its gradient
with respect to the student's cosines, written out: both are differences of softmaxes that the loss itself needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.communicator import Communicator
from icce_ray.methods.heads.sinkhorn import sinkhorn_targets

MIN_PROBABILITY = 1e-12


@dataclass
class PairLosses:
    """Losses of this worker's pairs."""

    loss_H: torch.Tensor
    """Sum over pairs, float32."""
    gradient_VHBK: torch.Tensor
    """Of the sum over pairs and heads, with respect to the student's cosines, float32."""


def teacher_targets(
    cosines_VHBK: torch.Tensor, config: HeadsConfig, communicator: Communicator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's distribution per view, head and image, and its logarithm: Sinkhorn-Knopp over the global batch of
    each view (ICCE), or a plain softmax (TEMI). Float32, same shape; one view or more."""
    if config.sinkhorn:
        return sinkhorn_targets(cosines_VHBK, config.teacher_temperature, config.sinkhorn_iterations, communicator)
    log_q_VHBK = torch.log_softmax(cosines_VHBK / config.teacher_temperature, dim=-1)
    return log_q_VHBK.exp(), log_q_VHBK


def pair_agreement(targets_VHBK: torch.Tensor) -> torch.Tensor:
    """Sum over heads of the probability that both views fall into the same cluster, (B,). The weight of a pair is its
    mean over all heads."""
    return (targets_VHBK[0] * targets_VHBK[1]).sum(dim=(0, 2))


def temi_losses(
    student_cosines_VHBK: torch.Tensor,
    teacher_log_VHBK: torch.Tensor,
    log_prior_HK: torch.Tensor,
    weight_B: torch.Tensor,
    config: HeadsConfig,
    ce_weight: float,
) -> PairLosses:
    """TEMI's loss plus `ce_weight` times the cross-entropy with the pseudo-labels.

    With a = z/T the student's logits, t the other view's log targets and p the prior, a view contributes
    -w/2 (logsumexp(beta (a + t) - log p) - beta logsumexp(a)), whose gradient is
    -w beta/(2T) (softmax(beta (a + t) - log p) - softmax(a)).

    Args:
        student_cosines_VHBK: cosines of the two views, float32.
        teacher_log_VHBK: log targets of the two views.
        log_prior_HK: log of the cluster prior.
        weight_B: weight of each pair.
        config: temperatures and beta.
        ce_weight: the present weight of the cross-entropy; at 0 it is not computed.
    """
    logits = student_cosines_VHBK / config.student_temperature
    # Each view's student is compared with the other view's teacher.
    other_teacher_log = teacher_log_VHBK.flip(0)
    shared = (logits + other_teacher_log).mul_(config.beta).sub_(log_prior_HK.unsqueeze(1))
    log_norm, student = _logsumexp_and_softmax(logits)
    log_shared, gradient = _logsumexp_and_softmax(shared)
    loss_VHB = -0.5 * weight_B * (log_shared - config.beta * log_norm)
    scale_B1 = (-0.5 * config.beta * weight_B).unsqueeze(-1)
    gradient.sub_(student).mul_(scale_B1)
    if ce_weight > 0.0:
        pseudo_label = other_teacher_log.argmax(dim=-1, keepdim=True)
        loss_VHB += 0.5 * ce_weight * (log_norm - logits.gather(-1, pseudo_label).squeeze(-1))
        gradient.add_(student, alpha=0.5 * ce_weight)
        gradient.scatter_add_(-1, pseudo_label, gradient.new_tensor(-0.5 * ce_weight).expand(pseudo_label.shape))
    return PairLosses(loss_VHB.sum(dim=(0, 2)), gradient.div_(config.student_temperature))


def scan_losses(
    student_cosines_VHBK: torch.Tensor, num_pairs: int, config: HeadsConfig, communicator: Communicator
) -> PairLosses:
    """SCAN's loss (arXiv 2005.12320, eq. 2): -log of the probability that an image and its neighbour share a cluster,
    less `scan_entropy_weight` times the entropy of the mean assignment.

    The entropy is that of the global batch of `num_pairs` pairs; each worker returns its pairs' part of it.
    """
    image_HBK, neighbor_HBK = torch.softmax(student_cosines_VHBK / config.student_temperature, dim=-1)
    mean_HK = communicator.sum_(image_HBK.sum(dim=1)) / num_pairs
    entropy_term_HBK = config.scan_entropy_weight * mean_HK.clamp_min(MIN_PROBABILITY).log().unsqueeze(1)
    shared_HB = (image_HBK * neighbor_HBK).sum(dim=-1).clamp_min(MIN_PROBABILITY)
    loss_HB = (image_HBK * entropy_term_HBK).sum(dim=-1) - shared_HB.log()
    slope_VHBK = torch.stack([neighbor_HBK, image_HBK]).div_(-shared_HB.unsqueeze(-1))
    slope_VHBK[0] += entropy_term_HBK
    probability_VHBK = torch.stack([image_HBK, neighbor_HBK])
    mean_slope = (probability_VHBK * slope_VHBK).sum(dim=-1, keepdim=True)
    gradient = probability_VHBK.mul_(slope_VHBK.sub_(mean_slope)).div_(config.student_temperature)
    return PairLosses(loss_HB.sum(dim=-1), gradient)


def _logsumexp_and_softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the last axis: (...,) and (..., K)."""
    largest = logits.amax(dim=-1, keepdim=True)
    exponentials = (logits - largest).exp_()
    total = exponentials.sum(dim=-1, keepdim=True)
    return (largest + total.log()).squeeze(-1), exponentials.div_(total)
