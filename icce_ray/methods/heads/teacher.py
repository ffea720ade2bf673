"""The teacher's part of a step: targets, prior and agreement of a block of heads (docs/METHOD.md, "Teacher").

V views: an image and the m neighbours drawn for it; H heads of the block, B pairs, K clusters.
"""

import torch

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.sinkhorn import sinkhorn_targets

MIN_PRIOR = 1e-12


def teacher_targets(
    cosines_VHBK: torch.Tensor, balance_H: torch.Tensor, settings: HeadsConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's distribution over clusters for each view, head and image, and its logarithm: by Sinkhorn-Knopp over
    each view's batch (ICCE), with `balance_H` for each head, or a softmax (TEMI). Float32, shaped like
    `cosines_VHBK`."""
    if settings.sinkhorn:
        power_H = None if settings.balance == 1.0 else balance_H  # equal masses need no power
        return sinkhorn_targets(cosines_VHBK, settings.teacher_temperature, settings.sinkhorn_iterations, power_H)
    log_q_VHBK = torch.log_softmax(cosines_VHBK / settings.teacher_temperature, dim=-1)
    return log_q_VHBK.exp(), log_q_VHBK


def smooth_over_neighbors(q_VHBK: torch.Tensor, log_q_VHBK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace the targets of several neighbours by their mean (docs/METHOD.md, "Smoothing over several neighbours").
    Returns the targets of the image and of its neighbour, and their logarithms (2, H, B, K)."""
    if len(q_VHBK) == 2:
        return q_VHBK, log_q_VHBK
    mean_HBK = q_VHBK[1:].mean(dim=0)
    return torch.stack([q_VHBK[0], mean_HBK]), torch.stack([log_q_VHBK[0], mean_HBK.log()])


def moved_prior(prior_HK: torch.Tensor, q_VHBK: torch.Tensor, momentum: float) -> torch.Tensor:
    """The cluster prior after a batch: a moving average of the mean target over images and views."""
    num_targets = q_VHBK.shape[0] * q_VHBK.shape[2]
    return prior_HK.lerp(q_VHBK.sum(dim=(0, 2)) / num_targets, 1.0 - momentum)


def log_prior(prior_HK: torch.Tensor) -> torch.Tensor:
    return prior_HK.clamp_min(MIN_PRIOR).log()


def pair_agreement(targets_VHBK: torch.Tensor) -> torch.Tensor:
    """Probability by each head that both images of a pair share a cluster, (H, B)."""
    return (targets_VHBK[0] * targets_VHBK[1]).sum(dim=-1)


def pair_weights(agreement_HB: torch.Tensor) -> torch.Tensor:
    """The weight of each pair, (B,): the mean agreement over all heads (docs/METHOD.md, "TEMI loss"). The heads are
    added one by one, so that the sum does not depend on how they are divided over workers and threads."""
    heads = agreement_HB.unbind()
    return sum(heads[1:], heads[0]) / len(heads)
