"""AdamW on the parameters of all heads, by torch's fused kernel.

``torch.optim.AdamW`` calls the same kernel, but imports torch's compiler when it is made: more than a second of every
process that trains, for something that is not used here.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.optim.adamw import adamw

from icce_ray.methods.heads.model import HeadParameters

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
BIASES = frozenset({"hidden_bias_HM", "bottleneck_bias_HP"})
"""Not decayed."""


class AdamW:
    """Moments and number of steps of each parameter; moves the parameters in place."""

    def __init__(self, parameters: HeadParameters, weight_decay: float) -> None:
        self.parameters = parameters.named()
        self.weight_decay = weight_decay
        self.state = {
            name: {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for name, parameter in self.parameters.items()
        }

    def step(self, gradient: HeadParameters, learning_rate: float, frozen: Collection[str] = ()) -> None:
        """One update. What is `frozen` stays as if it was not there: no decay, no moments."""
        gradients = gradient.named()
        for are_biases, weight_decay in ((False, self.weight_decay), (True, 0.0)):
            moved = [name for name in gradients if (name in BIASES) == are_biases and name not in frozen]
            adamw(
                [self.parameters[name] for name in moved],
                [gradients[name] for name in moved],
                [self.state[name]["exp_avg"] for name in moved],
                [self.state[name]["exp_avg_sq"] for name in moved],
                [],
                [self.state[name]["step"] for name in moved],
                fused=True,
                amsgrad=False,
                beta1=BETA1,
                beta2=BETA2,
                lr=learning_rate,
                weight_decay=weight_decay,
                eps=EPS,
                maximize=False,
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state itself, by ``parameter.key``: who copies into these tensors goes on from there."""
        return {f"{name}.{key}": value for name, state in self.state.items() for key, value in state.items()}
