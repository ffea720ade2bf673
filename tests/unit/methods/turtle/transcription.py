"""TURTLE as the paper has it (arXiv 2406.07236, eq. 9 to 12), with autograd and torch's own layers and optimisers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F


def plain_losses(
    encoder: Sequence[torch.Tensor],
    inner_start: Callable[[int], Sequence[torch.Tensor]],
    batch_of_step: Callable[[int], Sequence[torch.Tensor]],
    *,
    num_steps: int,
    inner_steps: int,
    learning_rate: float,
    inner_rates: Sequence[float],
    entropy_weight: float,
    warm_start: bool,
) -> list[tuple[float, float]]:
    """Prediction error and entropy of each step.

    Args:
        encoder: initial layer of the task encoder in each space.
        inner_start: initial classifiers of a step; of step 0 only with a warm start.
        batch_of_step: features of each space, (B, D).
    """
    tasks = [torch.nn.utils.parametrizations.weight_norm(linear(layer)) for layer in encoder]
    outer = torch.optim.Adam([p for task in tasks for p in task.parameters()], lr=learning_rate)
    losses = []
    for step in range(num_steps):
        spaces = batch_of_step(step)
        per_space = [task(z).softmax(dim=1) for task, z in zip(tasks, spaces, strict=True)]
        label = sum(per_space) / len(spaces)
        if step == 0 or not warm_start:
            classifiers = [linear(layer) for layer in inner_start(step)]
            groups = [
                {"params": list(w.parameters()), "lr": rate} for w, rate in zip(classifiers, inner_rates, strict=True)
            ]
            inner = torch.optim.Adam(groups)
        for _ in range(inner_steps):
            inner.zero_grad()
            sum(F.cross_entropy(w(z), label.detach()) for w, z in zip(classifiers, spaces, strict=True)).backward()
            inner.step()
        error = sum(F.cross_entropy(w(z).detach(), label) for w, z in zip(classifiers, spaces, strict=True))
        entropy = sum(torch.special.entr(tau.mean(dim=0)).sum() for tau in per_space)
        outer.zero_grad()
        (error - entropy_weight * entropy).backward()
        outer.step()
        losses.append((float(error.detach()), float(entropy.detach())))
    return losses


def linear(layer: torch.Tensor) -> torch.nn.Linear:
    """A ``nn.Linear`` with these weights (D, K) and, in a last row, biases."""
    made = torch.nn.Linear(len(layer) - 1, layer.shape[1])
    with torch.no_grad():
        made.weight.copy_(layer[:-1].t())
        made.bias.copy_(layer[-1])
    return made
