"""Learning rate, weight of the cross-entropy and teacher momentum over the course of training."""

from __future__ import annotations

import math

from icce_ray.config import HeadsConfig

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
