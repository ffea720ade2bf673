"""One step of TURTLE: train linear classifiers on the present labels, then move the labels to where these classifiers
predict them (docs/METHOD.md, "TURTLE").

The gradients are written by hand: an inner step then takes one pass over the features, each chunk of rows by one
thread.

Shape letters: n rows of a chunk, D dimensions of a space, K clusters, R runs, C = R K. Several runs share a pass over
the features: products with few columns cost as much as with 32. Logits and labels are R x K x n, because a softmax over
few contiguous numbers is slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch

from icce_ray.methods.turtle.feature_batches import Chunk, FeatureBatch
from icce_ray.methods.turtle.linear_layers import AdamParameters, Layers, TaskEncoder
from icce_ray.runtime.threads import ThreadPool

TINY = 1e-30
"""Keeps the logarithm of the share of an empty cluster finite."""

Gradients = list[tuple[torch.Tensor, torch.Tensor]]
"""Of weights (D, C) and biases (C,) of each space."""


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
    """Train the inner classifiers on the labels of the encoder and update the encoder, both in place.

    Args:
        inner: weights and biases of the classifier of each space.
    """
    chunks, num_rows = batch.chunks, batch.num_rows
    encoder_layers = pool.call(lambda: batch.cast(encoder.layers))

    def make_labels(chunk: Chunk) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
        spaces = soft_labels(chunk, encoder_layers, encoder.num_clusters)
        return spaces, mean_label(spaces), [label_RKn.sum(dim=2) for label_RKn in spaces]

    labels, targets, sums = zip(*pool.map(make_labels, chunks), strict=True)

    def inner_gradients(part: tuple[Chunk, torch.Tensor], layers: Layers) -> Gradients:
        chunk, target_RKn = part
        predicted = soft_labels(chunk, layers, encoder.num_clusters)
        slopes = [predicted_RKn.sub_(target_RKn) for predicted_RKn in predicted]
        return _through_layers(chunk, slopes)

    for _ in range(inner_steps):
        compute = partial(inner_gradients, layers=batch.cast(_layers(inner)))
        gradients = _mean_over_rows(pool.map(compute, zip(chunks, targets, strict=True)), num_rows)
        for parameters, (weight_DC, bias_C) in zip(inner, gradients, strict=True):
            parameters.update([weight_DC, bias_C])

    shares = [reduce(torch.add, space) / num_rows for space in zip(*sums, strict=True)]
    log_shares = [share_RK.clamp_min(TINY).log() for share_RK in shares]

    inner_layers = batch.cast(_layers(inner))

    def outer_gradients(part: tuple[Chunk, torch.Tensor, list[torch.Tensor]]) -> tuple[torch.Tensor, Gradients]:
        chunk, target_RKn, spaces = part
        logits = _logits(chunk, inner_layers, encoder.num_clusters)
        surprise_RKn = -reduce(torch.add, [torch.log_softmax(logits_RKn, dim=1) for logits_RKn in logits])
        slopes = []
        for label_RKn, log_share_RK in zip(spaces, log_shares, strict=True):
            slope_RKn = surprise_RKn / len(spaces) + entropy_weight * log_share_RK[:, :, None]
            slopes.append((slope_RKn - (label_RKn * slope_RKn).sum(dim=1, keepdim=True)) * label_RKn)
        return (surprise_RKn * target_RKn).sum(dim=(1, 2)), _through_layers(chunk, slopes)

    errors, found = zip(*pool.map(outer_gradients, zip(chunks, targets, labels, strict=True)), strict=True)
    pool.call(lambda: encoder.update(_mean_over_rows(found, num_rows)))
    entropies = [-(share_RK * log_RK).sum(dim=1) for share_RK, log_RK in zip(shares, log_shares, strict=True)]
    return StepLosses(reduce(torch.add, errors) / num_rows, reduce(torch.add, entropies))


def soft_labels(chunk: Chunk, layers: Layers, num_clusters: int) -> list[torch.Tensor]:
    """Softmax of the layer of each space, (R, K, n) float32."""
    return [torch.softmax(logits_RKn, dim=1) for logits_RKn in _logits(chunk, layers, num_clusters)]


def mean_label(spaces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The label that the spaces make together."""
    return spaces[0] if len(spaces) == 1 else reduce(torch.add, spaces) / len(spaces)


def _logits(chunk: Chunk, layers: Layers, num_clusters: int) -> list[torch.Tensor]:
    logits = []
    for features_nD, (weight_DC, bias_C) in zip(chunk.features_nD, layers, strict=True):
        logits_nC = features_nD @ weight_DC
        logits_Cn = torch.empty(logits_nC.t().shape, device=logits_nC.device).copy_(logits_nC.t())
        logits.append(logits_Cn.add_(bias_C[:, None]).view(-1, num_clusters, logits_Cn.shape[1]))
    return logits


def _through_layers(chunk: Chunk, slopes: Sequence[torch.Tensor]) -> Gradients:
    """Gradients of the layers, summed over rows, from those of their logits (R, K, n)."""
    found = []
    for features_Dn, slope_RKn in zip(chunk.features_Dn, slopes, strict=True):
        slope_Cn = slope_RKn.flatten(0, 1)
        found.append(((features_Dn @ slope_Cn.to(features_Dn.dtype).t()).float(), slope_Cn.sum(dim=1)))
    return found


def _mean_over_rows(found: Sequence[Gradients], num_rows: int) -> Gradients:
    """Gradients of a batch from sums over its chunks, added in their order."""
    return [
        (reduce(torch.add, weights).div_(num_rows), reduce(torch.add, biases).div_(num_rows))
        for weights, biases in (zip(*space, strict=True) for space in zip(*found, strict=True))
    ]


def _layers(inner: Sequence[AdamParameters]) -> Layers:
    return [(parameters.tensors[0], parameters.tensors[1]) for parameters in inner]
