"""The trained parts of TURTLE: linear layers with Adam, and the weight normalisation of the task encoder
(docs/METHOD.md, "TURTLE").

Shape letters: D dimensions of a space, K clusters, C = R K columns, those of R runs side by side. A weight matrix is
D x C, the transpose of torch's ``nn.Linear``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.adam import adam

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Weights (D, C) and biases (C,) of each space."""


class AdamParameters:
    """Tensors that Adam changes in place, and its state."""

    def __init__(self, tensors: Sequence[torch.Tensor], learning_rate: float) -> None:
        self.tensors = list(tensors)
        self.learning_rate = learning_rate
        self._means = [torch.zeros_like(tensor) for tensor in self.tensors]
        self._squares = [torch.zeros_like(tensor) for tensor in self.tensors]
        self._counts = [torch.zeros((), device=tensor.device) for tensor in self.tensors]

    def update(self, gradients: Sequence[torch.Tensor]) -> None:
        """One step of Adam, by the kernel of ``torch.optim.Adam``, whose class takes a second to import."""
        adam(
            self.tensors, list(gradients), self._means, self._squares, [], self._counts, fused=True, amsgrad=False,
            beta1=BETA1, beta2=BETA2, lr=self.learning_rate, weight_decay=0.0, eps=EPS, maximize=False,
        )  # fmt: skip

    def named(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors by a name in a checkpoint."""
        lists = {"value": self.tensors, "mean": self._means, "square": self._squares, "count": self._counts}
        return {f"{name}.{kind}.{i}": tensor for kind, tensors in lists.items() for i, tensor in enumerate(tensors)}


def initial_layer(
    dim: int, num_clusters: int, generators: Sequence[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (D, C) and biases (C,) as ``nn.Linear`` draws them, uniform within 1 / sqrt(D), those of each run by its
    own generator."""
    bound = dim**-0.5
    weights, biases = [], []
    for generator in generators:
        empty = torch.empty((dim + 1, num_clusters), device=generator.device)
        drawn = empty.uniform_(-bound, bound, generator=generator)
        weights.append(drawn[:dim])
        biases.append(drawn[dim])
    return torch.cat(weights, dim=1), torch.cat(biases)


class TaskEncoder:
    """A weight-normalised linear layer for each space: W = l v / |v| for each column, with the length l and the
    direction v trained apart, and biases.

    Args:
        dims: D of each space.
        generators: draw the initial layers of each run, on the device to compute on.
    """

    def __init__(
        self, dims: Sequence[int], num_clusters: int, learning_rate: float, generators: Sequence[torch.Generator]
    ) -> None:
        self.num_clusters = num_clusters
        layers = [initial_layer(dim, num_clusters, generators) for dim in dims]
        tensors = [tensor for direction, bias in layers for tensor in (direction, direction.norm(dim=0), bias)]
        self.parameters = AdamParameters(tensors, learning_rate)

    @property
    def layers(self) -> Layers:
        """Weights (D, C) and biases (C,) of each space."""
        return [(direction * (length / direction.norm(dim=0)), bias) for direction, length, bias in self._spaces()]

    def update(self, gradients: Layers) -> None:
        """One step of Adam. `gradients`: of the weights and biases in `layers`."""
        given = []
        for (direction, length, _), (weight_grad, bias_grad) in zip(self._spaces(), gradients, strict=True):
            norm = direction.norm(dim=0)
            unit = direction / norm
            along = (weight_grad * unit).sum(dim=0)
            given += [(weight_grad - along * unit) * (length / norm), along, bias_grad]
        self.parameters.update(given)

    def _spaces(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        tensors = iter(self.parameters.tensors)
        return list(zip(tensors, tensors, tensors, strict=True))
