"""The features of a batch, in chunks of rows that threads work on.

Shape letters: n rows of a chunk, B rows of a batch, D dimensions of a space, E = D + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from icce_ray.methods.turtle.linear_layers import Layers

CHUNK_ROWS = 2560
"""Rows that a CPU's thread works on at a time. Products in bfloat16 are up to twice as fast if it is a multiple of 64,
and no power of two."""


CastLayers = list[tuple[torch.Tensor, torch.Tensor]]
"""Weights (D, C) in the dtype of the features, and float32 biases (C, 1), of each space."""


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
