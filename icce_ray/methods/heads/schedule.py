"""What changes as training goes on: learning rate, weight of the cross-entropy, the teacher's memory."""

from __future__ import annotations

import math

from icce_ray.config import HeadsConfig

BASE_BATCH_SIZE = 256
TEACHER_MEMORY = 0.05
MAX_TEACHER_MEMORY_STEPS = 250.0


def learning_rate_at(epoch: float, steps_per_epoch: int, num_pairs: int, config: HeadsConfig) -> float:
    """Linear warm-up, then constant; proportional to the pairs of the step."""
    target = config.learning_rate * num_pairs / BASE_BATCH_SIZE
    warmup = min(config.warmup_epochs, config.num_epochs)
    if epoch >= warmup:
        return target
    return target * (epoch * steps_per_epoch + 1) / (warmup * steps_per_epoch)


def ce_weight_at(epoch: float, config: HeadsConfig) -> float:
    """lambda(t) = lambda_max (1 - cos(pi t / T)) / 2."""
    return config.max_ce_weight * (1.0 - math.cos(math.pi * epoch / config.num_epochs)) / 2.0


def teacher_momentum(config: HeadsConfig, steps_per_epoch: int) -> float:
    """The teacher's momentum. `auto` [ours]: a teacher that remembers as long as the paper's, 250 steps, would still be
    what it was at the start when a short run on a small collection ends."""
    if config.teacher_momentum != "auto":
        return config.teacher_momentum
    remembered = min(max(1.0, TEACHER_MEMORY * steps_per_epoch * config.num_epochs), MAX_TEACHER_MEMORY_STEPS)
    return 1.0 - 1.0 / remembered
