"""The trained parts of TURTLE: linear layers with Adam, and the weight normalisation of the task encoder
(docs/METHOD.md, "TURTLE").

Shape letters: D dimensions of a space, E = D + 1, K clusters, C = R K columns, those of R runs side by side. A layer is
an E x C matrix: the transpose of the weights of torch's ``nn.Linear``, and a last row of biases.
"""

from collections.abc import Sequence

import torch

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

Layers = Sequence[torch.Tensor]
"""The layer (E, C) of each space, or its gradient."""


class AdamParameters:
    """Tensors that Adam changes in place, and its state."""

    def __init__(self, tensors: Sequence[torch.Tensor], learning_rate: float) -> None:
        self.tensors = list(tensors)
        self.learning_rate = learning_rate
        self._means = [torch.zeros_like(tensor) for tensor in self.tensors]
        self._squares = [torch.zeros_like(tensor) for tensor in self.tensors]
        self._counts = [torch.zeros((), device=tensor.device) for tensor in self.tensors]

    def update(self, gradients: Sequence[torch.Tensor]) -> None:
        """One step of Adam, by the kernel of ``torch.optim.Adam``. Its class takes a second to import, and its function
        ten times as long as the kernel."""
        torch._foreach_add_(self._counts, 1)
        torch._fused_adam_(
            self.tensors, list(gradients), self._means, self._squares, [], self._counts, amsgrad=False,
            beta1=BETA1, beta2=BETA2, lr=self.learning_rate, weight_decay=0.0, eps=EPS, maximize=False,
        )  # fmt: skip

    def named(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors by a name in a checkpoint."""
        lists = {"value": self.tensors, "mean": self._means, "square": self._squares, "count": self._counts}
        return {f"{name}.{kind}.{i}": tensor for kind, tensors in lists.items() for i, tensor in enumerate(tensors)}


def initial_layer(dim: int, num_clusters: int, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """A layer (E, C) as ``nn.Linear`` draws it, uniform within 1 / sqrt(D), the columns of each run by its own
    generator."""
    bound = dim**-0.5
    drawn = [
        torch.empty((dim + 1, num_clusters), device=generator.device).uniform_(-bound, bound, generator=generator)
        for generator in generators
    ]
    return torch.cat(drawn, dim=1)


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
        tensors = [
            tensor for layer in layers for tensor in (layer[:-1].clone(), layer[:-1].norm(dim=0), layer[-1:].clone())
        ]
        self.parameters = AdamParameters(tensors, learning_rate)

    @property
    def layers(self) -> Layers:
        """The layer (E, C) of each space."""
        return [
            torch.cat([v_DC * (length_C / v_DC.norm(dim=0)), bias_1C]) for v_DC, length_C, bias_1C in self._spaces()
        ]

    def update(self, gradients: Layers) -> None:
        """One step of Adam. `gradients`: of `layers`."""
        given = []
        for (v_DC, length_C, _), gradient_EC in zip(self._spaces(), gradients, strict=True):
            norm_C, weight_grad_DC = v_DC.norm(dim=0), gradient_EC[:-1]
            unit_DC = v_DC / norm_C
            along_C = (weight_grad_DC * unit_DC).sum(dim=0)
            given += [(weight_grad_DC - along_C * unit_DC) * (length_C / norm_C), along_C, gradient_EC[-1:]]
        self.parameters.update(given)

    def _spaces(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Direction (D, C), length (C,) and biases (1, C) of each space."""
        tensors = iter(self.parameters.tensors)
        return list(zip(tensors, tensors, tensors, strict=True))
