"""Sinkhorn-Knopp: teacher targets that spread a batch evenly over the clusters (METHOD section 2)."""

from __future__ import annotations

import torch

from icce_ray.methods.heads.communicator import Communicator, SingleWorker

MAX_EXPONENT = 40.0
"""Up to here exp(-x), and the product of two of them, are normal float32 numbers."""


def sinkhorn_targets(
    cosines_VHBK: torch.Tensor,
    temperature: float,
    num_iterations: int,
    communicator: Communicator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The balanced assignment of each view's batch, per head.

    Starts from exp(cosines / temperature) and alternates: each cluster's mass to 1/K, each image's to 1/B; then scales
    by B, so that every row is a distribution. All that the alternation does is to scale rows and columns, so the
    exponentials are taken once and each half step is a product of a matrix and a vector. Low temperatures, at which
    exponentials underflow, go through logarithms instead.

    Args:
        cosines_VHBK: float32 in -1..1, views x heads x this worker's images x clusters.
        temperature: T_sk.
        num_iterations: alternations.
        communicator: sums over the workers that share the batch.

    Returns:
        The assignment, rows sum to 1, and its logarithm; float32, shaped like `cosines_VHBK`.
    """
    communicator = communicator or SingleWorker()
    if 2.0 / temperature > MAX_EXPONENT:
        log_q_VHBK = _in_logarithms(cosines_VHBK / temperature, num_iterations, communicator)
        return log_q_VHBK.exp(), log_q_VHBK
    log_q = ((cosines_VHBK - 1.0) / temperature).flatten(0, 1)
    kernel = log_q.exp()
    row_scale = torch.ones_like(kernel[..., :1])
    for _ in range(num_iterations):
        column_scale = communicator.sum_(torch.bmm(kernel.transpose(1, 2), row_scale)).reciprocal_()
        # The rows take a common factor back: without this it would grow with every iteration.
        column_scale /= column_scale.amax(dim=1, keepdim=True)
        row_scale = torch.bmm(kernel, column_scale).reciprocal_()
    column_scale = column_scale.transpose(1, 2)
    q = kernel.mul_(row_scale).mul_(column_scale)
    log_q.add_(row_scale.log()).add_(column_scale.log())
    return q.view_as(cosines_VHBK), log_q.view_as(cosines_VHBK)


def _in_logarithms(log_q: torch.Tensor, num_iterations: int, communicator: Communicator) -> torch.Tensor:
    for _ in range(num_iterations):
        log_mass_VHK = _log_sum_over_batch(log_q, communicator)
        log_q = log_q - log_mass_VHK.unsqueeze(-2)
        log_q = torch.log_softmax(log_q, dim=-1)
    return log_q


def _log_sum_over_batch(log_q: torch.Tensor, communicator: Communicator) -> torch.Tensor:
    if communicator.num_workers == 1:
        return torch.logsumexp(log_q, dim=-2)
    largest = communicator.max_(log_q.amax(dim=-2))
    return largest + torch.log(communicator.sum_(torch.exp(log_q - largest.unsqueeze(-2)).sum(dim=-2)))
