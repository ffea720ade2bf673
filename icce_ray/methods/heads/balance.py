"""How much balance a head needs to keep its clusters, and new prototypes for those that it has lost (docs/METHOD.md,
"Balance").

H heads of a block, K clusters, n rows, P bottleneck width.
"""

import numpy as np
import torch
import torch.nn.functional as F

from icce_ray.methods.heads.model import forward
from icce_ray.methods.heads.state import HeadState

MAX_EMPTY, MAX_NUM_EMPTY = 0.05, 8
"""A head may have this share of its clusters empty, or this number (at most half of them) if that is more."""
FALL, LAST_FALL = 0.2, 0.5
"""The balance falls from 1 to 0 within the first part of the training, and not any more after the second."""
RISE = 0.2
"""How far it rises after an epoch if it is too low."""
COMPARISON = 0.6
"""If the heads disagree about sizes after this part of the training, those that have lost clusters are balanced
again."""
LAST_RENEWAL = 0.7
"""Part of the training after which prototypes are not renewed, so that the labels come to rest."""


def has_too_many_empty(sizes_HK: torch.Tensor) -> torch.Tensor:
    """Whether a head has more empty clusters than it may, by the cluster sizes of an epoch; bool (H,)."""
    num_clusters = sizes_HK.shape[1]
    return (sizes_HK == 0).sum(dim=1) > max(MAX_EMPTY * num_clusters, min(MAX_NUM_EMPTY, num_clusters / 2))


def comparison_epoch(num_epochs: int) -> int:
    """Number of the epoch, from 1, after which the heads compare the sizes of their clusters."""
    return max(1, round(COMPARISON * num_epochs))


def move_balance(balance_H: torch.Tensor, needs_more_H: torch.Tensor, epoch: int, num_epochs: int) -> None:
    """After an epoch (from 0), raise the balance of the heads that need more. In the first half of the training, lower
    that of the others. Within 0..1, in place."""
    fall = 1.0 / max(1, round(FALL * num_epochs)) if epoch < LAST_FALL * num_epochs else 0.0
    balance_H.add_(torch.where(needs_more_H, RISE, -fall)).clamp_(0.0, 1.0)


def renew_prototypes(
    state: HeadState, inputs: torch.Tensor, sizes_HK: torch.Tensor, seeds: list[list[int] | None]
) -> None:
    """Put the prototypes of empty clusters where an image is far from every prototype, in student and teacher.

    The images are drawn as the centres of k-means++ are: with a probability proportional to the distance, 1 - cosine,
    to the nearest prototype, those just placed included.

    Args:
        state: of a block of heads, changed in place.
        inputs: of these heads for some images, as :func:`forward` takes them.
        sizes_HK: cluster sizes.
        seeds: seed of the draw of each head; None: this head keeps its prototypes.
    """
    cache = forward(state.teacher, inputs)
    for head, seed in enumerate(seeds):
        if seed is None:
            continue
        generator = np.random.default_rng(seed)
        unit_nP = F.normalize(cache.bottleneck_HnP[head], dim=-1)
        distance_n = 1.0 - cache.cosines_HnK[head].amax(dim=-1)
        for cluster in torch.nonzero(sizes_HK[head] == 0).flatten().tolist():
            weight_n = distance_n.clamp_min(1e-6).double().cpu().numpy()
            chosen_P = unit_nP[int(generator.choice(len(weight_n), p=weight_n / weight_n.sum()))]
            distance_n = torch.minimum(distance_n, 1.0 - unit_nP @ chosen_P)
            for parameters in (state.student, state.teacher):
                prototypes_KP = parameters.prototypes_HKP[head]
                prototypes_KP[cluster] = chosen_P * prototypes_KP.norm(dim=-1).mean()
            for moments in (state.moments.mean, state.moments.square):
                moments.prototypes_HKP[head, cluster] = 0.0
