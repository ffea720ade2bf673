"""AdamW, by torch's fused kernel (docs/METHOD.md, "Optimisation").

``torch.optim.AdamW`` calls the same function, but imports torch's compiler when it is created, which takes more than a
second in every process that trains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from icce_ray.methods.heads.model import HeadParameters

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
BIASES = frozenset({"hidden_bias_HM", "bottleneck_bias_HP"})
"""Parameters without weight decay."""


@dataclass
class Moments:
    """AdamW's running means of the gradient and of its square."""

    mean: HeadParameters
    square: HeadParameters


def adamw_update(
    parameters: HeadParameters, gradient: HeadParameters, moments: Moments, num_updates: dict[str, int],
    learning_rate: float, weight_decay: float,
) -> None:  # fmt: skip
    """Move the parameters and their moments in place.

    Args:
        parameters, gradient, moments: of the same heads.
        num_updates: how often each parameter was moved before. A parameter that is not named is frozen: no update, no
            decay, no change of its moments.
        learning_rate, weight_decay: of this update. Biases do not decay.
    """
    device = parameters.prototypes_HKP.device
    for names, decay in ((num_updates.keys() - BIASES, weight_decay), (num_updates.keys() & BIASES, 0.0)):
        owners = (parameters, gradient, moments.mean, moments.square)
        values, gradients, means, squares = ([getattr(owner, name) for name in names] for owner in owners)
        counts = [torch.full((), float(num_updates[name]), device=device) for name in names]
        adamw(
            values, gradients, means, squares, [], counts, fused=True, amsgrad=False, beta1=BETA1, beta2=BETA2,
            lr=learning_rate, weight_decay=decay, eps=EPS, maximize=False,
        )  # fmt: skip
