"""TURTLE's linear layers with Adam, the weight normalisation of the task encoder, and one step: train linear
classifiers on the present labels, then move the labels to where they predict them (docs/METHOD.md, "TURTLE").

The gradients are written by hand: an inner step then takes one pass over the features of a batch, each chunk of rows by
one thread.

Shape letters: n rows of a chunk, B rows of a batch, D dimensions of a space, E = D + 1, K clusters, R runs, C = R K.
Several runs share a pass over the features: a product waits for them, and takes little longer with 32 columns than with
10. Logits and labels are R x K x n, because a softmax over few contiguous numbers is slow. A layer is an E x C matrix:
the transpose of the weights of torch's ``nn.Linear``, and a last row of biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
import torch.nn.functional as F

from icce_ray.runtime.threads import ThreadPool

CHUNK_ROWS = 2560
"""Rows that a CPU's thread works on at a time. Products in bfloat16 are up to twice as fast if it is a multiple of 64,
and no power of two."""


CastLayers = list[tuple[torch.Tensor, torch.Tensor]]
"""Weights (D, C) in the dtype of the features, and float32 biases (C, 1), of each space."""
TINY = 1e-30
"""Keeps the logarithm of the share of an empty cluster finite."""
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
Layers = Sequence[torch.Tensor]
"""The layer (E, C) of each space, or its gradient."""


@dataclass(frozen=True)
class Chunk:
    """Some rows in every space, in both orders: a product with a matrix of few columns is two to three times as fast if
    the inner dimension is contiguous."""

    features_nD: list[torch.Tensor]
    features_En: list[torch.Tensor]
    """The last row is 1, so that a product gives the gradients of weights and biases."""


@dataclass(frozen=True)
class FeatureBatch:
    """The chunks of a batch. They depend on its size and the kind of device alone, and so do all sums over them."""

    num_rows: int
    chunks: list[Chunk]

    @classmethod
    def of(cls, features_BD: Sequence[torch.Tensor]) -> FeatureBatch:
        """A batch of the features of each space."""
        num_rows = len(features_BD[0])
        chunks = []
        for rows in chunk_slices(num_rows, features_BD[0].device):
            parts = [space_BD[rows] for space_BD in features_BD]
            chunks.append(Chunk(parts, [F.pad(part.t(), (0, 0, 0, 1), value=1.0).contiguous() for part in parts]))
        return cls(num_rows, chunks)

    def cast(self, layers: Layers) -> CastLayers:
        """The layers for products with the chunks."""
        dtype = self.chunks[0].features_nD[0].dtype
        return [(layer_EC[:-1].to(dtype), layer_EC[-1][:, None]) for layer_EC in layers]


def chunk_slices(num_rows: int, device: torch.device) -> list[slice]:
    """Chunks of equal size, the last one with what is left; a GPU takes all rows at once."""
    size = num_rows if device.type == "cuda" else CHUNK_ROWS
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


Labeled = tuple[Chunk, torch.Tensor, Sequence[torch.Tensor]]
"""A chunk, its labels, and those that each space gives, (R, K, n)."""


@dataclass(frozen=True)
class StepLosses:
    """The parts of the loss of a step, before its update; tensors, so that a GPU doesn't wait for them."""

    prediction_error: torch.Tensor
    """(R,), cross-entropy of the trained classifiers with the labels, summed over spaces."""
    entropy: torch.Tensor
    """(R,), entropy of the mean label, summed over spaces, in nats."""


def bilevel_step(
    encoder: TaskEncoder,
    inner: Sequence[AdamParameters],
    batch: FeatureBatch,
    *,
    inner_steps: int,
    entropy_weight: float,
    pool: ThreadPool,
) -> StepLosses:
    """Train the inner classifiers, one for each space, on the labels of the encoder and update the encoder, all in
    place. The number of the pool's threads does not change a bit."""
    num_rows, num_clusters = batch.num_rows, encoder.num_clusters
    both = batch.cast([torch.cat(pair, dim=1) for pair in zip(encoder.layers, _layers(inner), strict=True)])

    def label_and_first_gradients(chunk: Chunk) -> tuple[Labeled, Layers]:
        """One pass over the features makes the labels and the first predictions."""
        found = [torch.softmax(logits_RKn, dim=1).tensor_split(2) for logits_RKn in _logits(chunk, both, num_clusters)]
        labels, predicted = zip(*found, strict=True)
        target_RKn = labels[0] if len(labels) == 1 else reduce(torch.add, labels) / len(labels)
        return (chunk, target_RKn, labels), _gradients(chunk, [logits.sub_(target_RKn) for logits in predicted])

    def inner_gradients(part: Labeled, layers: CastLayers) -> Layers:
        chunk, target_RKn, _ = part
        logits = _logits(chunk, layers, num_clusters)
        return _gradients(chunk, [torch.softmax(logits_RKn, dim=1).sub_(target_RKn) for logits_RKn in logits])

    parts, found = zip(*pool.map(label_and_first_gradients, batch.chunks), strict=True)
    _update(inner, found, num_rows)
    for _ in range(inner_steps - 1):
        _update(inner, pool.map(partial(inner_gradients, layers=batch.cast(_layers(inner))), parts), num_rows)

    spaces = zip(*(labels for _, _, labels in parts), strict=True)
    shares = [reduce(torch.add, [label_RKn.sum(dim=2) for label_RKn in space]) / num_rows for space in spaces]
    log_shares = [share_RK.clamp_min(TINY).log() for share_RK in shares]
    trained = batch.cast(_layers(inner))

    def outer_gradients(part: Labeled) -> tuple[torch.Tensor, Layers]:
        chunk, target_RKn, labels = part
        logits = _logits(chunk, trained, num_clusters)
        surprise_RKn = -reduce(torch.add, [torch.log_softmax(logits_RKn, dim=1) for logits_RKn in logits])
        slopes = []
        for label_RKn, log_share_RK in zip(labels, log_shares, strict=True):
            slope_RKn = surprise_RKn / len(labels) + entropy_weight * log_share_RK[:, :, None]
            slopes.append((slope_RKn - (label_RKn * slope_RKn).sum(dim=1, keepdim=True)) * label_RKn)
        return (surprise_RKn * target_RKn).sum(dim=(1, 2)), _gradients(chunk, slopes)

    errors, found = zip(*pool.map(outer_gradients, parts), strict=True)
    encoder.update(_mean_over_rows(found, num_rows))
    entropies = [-(share_RK * log_RK).sum(dim=1) for share_RK, log_RK in zip(shares, log_shares, strict=True)]
    return StepLosses(reduce(torch.add, errors) / num_rows, reduce(torch.add, entropies))


def _logits(chunk: Chunk, layers: CastLayers, num_clusters: int) -> list[torch.Tensor]:
    """Of each space, (R, K, n) float32."""
    logits = []
    for features_nD, (weight_DC, bias_C1) in zip(chunk.features_nD, layers, strict=True):
        logits_nC = features_nD @ weight_DC
        logits_Cn = torch.empty(logits_nC.t().shape, device=logits_nC.device)
        torch.add(logits_nC.t(), bias_C1, out=logits_Cn)
        logits.append(logits_Cn.view(-1, num_clusters, len(logits_nC)))
    return logits


def _gradients(chunk: Chunk, slopes: Sequence[torch.Tensor]) -> Layers:
    """Gradients of the layers, summed over rows, from those of their logits (R, K, n)."""
    return [
        features_En @ slope_RKn.flatten(0, 1).to(features_En.dtype).t()
        for features_En, slope_RKn in zip(chunk.features_En, slopes, strict=True)
    ]


def _mean_over_rows(found: Sequence[Layers], num_rows: int) -> Layers:
    """Gradients of a batch from sums over its chunks."""
    return [torch.stack(space).sum(dim=0, dtype=torch.float32).div_(num_rows) for space in zip(*found, strict=True)]


def _update(inner: Sequence[AdamParameters], found: Sequence[Layers], num_rows: int) -> None:
    for parameters, gradient_EC in zip(inner, _mean_over_rows(found, num_rows), strict=True):
        parameters.update([gradient_EC])


def _layers(inner: Sequence[AdamParameters]) -> Layers:
    return [parameters.tensors[0] for parameters in inner]


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
    direction v trained apart, and biases. The generators, on the device to compute on, draw the initial layers of each
    run."""

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
