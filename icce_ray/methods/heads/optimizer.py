"""AdamW, by torch's fused kernel (docs/METHOD.md, "Optimisation"), and what changes over the course of training:
learning rate, weight of the cross-entropy, teacher momentum.

``torch.optim.AdamW`` calls the same function, but imports torch's compiler when it is created, which takes more than a
second in every process that trains.
"""

import math
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.model import HeadParameters

BASE_BATCH_SIZE = 256
TEACHER_MEMORY = 0.05
MAX_TEACHER_MEMORY_STEPS = 250.0


def learning_rate_at(epoch: float, steps_per_epoch: int, num_pairs: int, settings: HeadsConfig) -> float:
    """Linear warm-up, then constant; proportional to the number of pairs (docs/METHOD.md, "Optimisation")."""
    target = settings.learning_rate * num_pairs / BASE_BATCH_SIZE
    warmup = min(settings.warmup_epochs, settings.num_epochs)
    if epoch >= warmup:
        return target
    return target * (epoch * steps_per_epoch + 1) / (warmup * steps_per_epoch)


def ce_weight_at(epoch: float, settings: HeadsConfig) -> float:
    """lambda(t) = lambda_max (1 - cos(pi t / T)) / 2 (docs/METHOD.md, "Cross-entropy term")."""
    return settings.max_ce_weight * (1.0 - math.cos(math.pi * epoch / settings.num_epochs)) / 2.0


def teacher_momentum(settings: HeadsConfig, steps_per_epoch: int) -> float:
    """Momentum of the teacher's moving average (docs/METHOD.md, "Teacher").

    With the paper's 250 steps of memory, the teacher of a short run would still be close to its initialisation at the
    end. `auto` remembers a twentieth of the run instead, at most 250 steps.
    """
    if settings.teacher_momentum != "auto":
        return settings.teacher_momentum
    remembered = min(max(1.0, TEACHER_MEMORY * steps_per_epoch * settings.num_epochs), MAX_TEACHER_MEMORY_STEPS)
    return 1.0 - 1.0 / remembered


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
