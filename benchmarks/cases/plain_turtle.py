"""TURTLE (arXiv 2406.07236) with autograd, torch's own layers and optimisers, float32, a batch gathered each step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F


class PlainTurtle:
    """One run on one feature set, with the paper's constants.

    Args:
        features_ND: float32.
        num_clusters: K.
        batch_size: at most N.
        weights_DK, biases_K: initial layer of the task encoder.
    """

    def __init__(
        self,
        features_ND: npt.NDArray[np.float32],
        num_clusters: int,
        batch_size: int,
        weights_DK: torch.Tensor,
        biases_K: torch.Tensor,
    ) -> None:
        self.features_ND = features_ND
        self.num_clusters = num_clusters
        self.batch_size = min(batch_size, len(features_ND))
        layer = _linear(weights_DK, biases_K)
        self.task = torch.nn.utils.parametrizations.weight_norm(layer)
        self.generator = np.random.default_rng(0)
        self.outer = torch.optim.Adam(self.task.parameters(), lr=1e-3)

    def step(self, start: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        """One step. `start`: weights and biases that the classifier starts from; None: its own draw."""
        rows = self.generator.choice(len(self.features_ND), self.batch_size, replace=False)
        batch = torch.from_numpy(self.features_ND[rows])
        label = self.task(batch).softmax(dim=1)
        classifier = torch.nn.Linear(batch.shape[1], self.num_clusters) if start is None else _linear(*start)
        inner = torch.optim.Adam(classifier.parameters(), lr=1e-3)
        for _ in range(10):
            inner.zero_grad()
            F.cross_entropy(classifier(batch), label.detach()).backward()
            inner.step()
        error = F.cross_entropy(classifier(batch).detach(), label)
        self.outer.zero_grad()
        (error - 10.0 * torch.special.entr(label.mean(dim=0)).sum()).backward()
        self.outer.step()

    def labels(self) -> npt.NDArray[np.int64]:
        with torch.no_grad():
            return self.task(torch.from_numpy(self.features_ND)).argmax(dim=1).numpy()


def _linear(weights_DK: torch.Tensor, biases_K: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(*weights_DK.shape)
    with torch.no_grad():
        layer.weight.copy_(weights_DK.t())
        layer.bias.copy_(biases_K)
    return layer
