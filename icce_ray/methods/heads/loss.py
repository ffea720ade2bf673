"""The losses of a head: TEMI's, the cross-entropy with pseudo-labels, and SCAN's.

V = 2 views (an image and its neighbour), H heads, B pairs, K clusters.

Each loss comes with its gradient with respect to the student's cosines, written out: it is a difference of softmaxes
that the loss needs anyway. Autograd takes 1.4 to 1.7 times as long for it, 4 to 15% of a step on a CPU.
"""

from dataclasses import dataclass

import torch

from icce_ray.config import HeadsConfig

MIN_PROBABILITY = 1e-12


@dataclass
class PairLosses:
    """Losses of a batch of pairs."""

    loss_H: torch.Tensor
    """Sum over pairs, float32."""
    gradient_VHBK: torch.Tensor
    """Gradient of the sum over pairs and heads with respect to the student's cosines, float32."""


def icce_losses(
    student_cosines_VHBK: torch.Tensor,
    teacher_log_VHBK: torch.Tensor,
    log_prior_HK: torch.Tensor,
    weight_B: torch.Tensor,
    ce_weight: torch.Tensor,
    settings: HeadsConfig,
) -> PairLosses:
    """TEMI's loss plus `ce_weight` times the cross-entropy (docs/METHOD.md, "TEMI loss" and "Cross-entropy term").

    With a = z/T the student's logits, t the other view's log targets and p the prior, a view contributes
    -w/2 (logsumexp(beta (a + t) - log p) - beta logsumexp(a)), whose gradient is
    -w beta/(2T) (softmax(beta (a + t) - log p) - softmax(a)).

    Args:
        student_cosines_VHBK: cosines of the two views, float32.
        teacher_log_VHBK: log targets of the two views.
        log_prior_HK: log of the cluster prior.
        weight_B: weight of each pair.
        ce_weight: present weight of the cross-entropy, float32 scalar tensor.
        settings: temperatures, beta, and whether there is a cross-entropy term.
    """
    logits = student_cosines_VHBK / settings.student_temperature
    # Each view's student is compared with the other view's teacher.
    other_teacher_log = teacher_log_VHBK.flip(0)
    shared = (logits + other_teacher_log).mul_(settings.beta).sub_(log_prior_HK.unsqueeze(1))
    log_norm, student = _logsumexp_and_softmax(logits)
    log_shared, gradient = _logsumexp_and_softmax(shared)
    loss_VHB = -0.5 * weight_B * (log_shared - settings.beta * log_norm)
    scale_B1 = (-0.5 * settings.beta * weight_B).unsqueeze(-1)
    gradient.sub_(student).mul_(scale_B1)
    if settings.max_ce_weight > 0.0:
        pseudo_label = other_teacher_log.argmax(dim=-1, keepdim=True)
        loss_VHB, gradient = _add_cross_entropy(loss_VHB, gradient, logits, log_norm, student, pseudo_label, ce_weight)
    return PairLosses(loss_VHB.sum(dim=(0, 2)), gradient.div_(settings.student_temperature))


def scan_losses(student_cosines_VHBK: torch.Tensor, settings: HeadsConfig) -> PairLosses:
    """SCAN's loss (docs/METHOD.md, "SCAN"): -log of the probability that an image and its neighbour share a cluster,
    minus `scan_entropy_weight` times the entropy of the batch's mean assignment."""
    image_HBK, neighbor_HBK = torch.softmax(student_cosines_VHBK / settings.student_temperature, dim=-1)
    mean_HK = image_HBK.sum(dim=1) / image_HBK.shape[1]
    entropy_term_HBK = settings.scan_entropy_weight * mean_HK.clamp_min(MIN_PROBABILITY).log().unsqueeze(1)
    shared_HB = (image_HBK * neighbor_HBK).sum(dim=-1).clamp_min(MIN_PROBABILITY)
    loss_HB = (image_HBK * entropy_term_HBK).sum(dim=-1) - shared_HB.log()
    slope_VHBK = torch.stack([neighbor_HBK, image_HBK]).div_(-shared_HB.unsqueeze(-1))
    slope_VHBK[0] += entropy_term_HBK
    probability_VHBK = torch.stack([image_HBK, neighbor_HBK])
    mean_slope = (probability_VHBK * slope_VHBK).sum(dim=-1, keepdim=True)
    gradient = probability_VHBK.mul_(slope_VHBK.sub_(mean_slope)).div_(settings.student_temperature)
    return PairLosses(loss_HB.sum(dim=-1), gradient)


def _add_cross_entropy(
    loss_VHB: torch.Tensor, gradient_VHBK: torch.Tensor, logits_VHBK: torch.Tensor, log_norm_VHB: torch.Tensor,
    student_VHBK: torch.Tensor, pseudo_label_VHB1: torch.Tensor, ce_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Eq. 1 to 3 of the paper: add half the weighted cross-entropy of each view with the other view's pseudo-label.
    `gradient_VHBK` is by the logits; it is changed in place."""
    half = 0.5 * ce_weight
    loss_VHB = loss_VHB + half * (log_norm_VHB - logits_VHBK.gather(-1, pseudo_label_VHB1).squeeze(-1))
    gradient_VHBK.addcmul_(student_VHBK, half)
    return loss_VHB, gradient_VHBK.scatter_add_(-1, pseudo_label_VHB1, (-half).expand(pseudo_label_VHB1.shape))


def _logsumexp_and_softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the last axis: (...,) and (..., K)."""
    largest = logits.amax(dim=-1, keepdim=True)
    exponentials = (logits - largest).exp_()
    total = exponentials.sum(dim=-1, keepdim=True)
    return (largest + total.log()).squeeze(-1), exponentials.div_(total)
