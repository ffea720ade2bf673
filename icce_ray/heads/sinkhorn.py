"""Sinkhorn-Knopp: teacher targets that spread a batch evenly over the clusters (METHOD section 2)."""

from __future__ import annotations

import torch

from icce_ray.heads.communicator import Communicator, SingleWorker


def sinkhorn_log_targets(
    logits_VHBK: torch.Tensor,
    temperature: float,
    num_iterations: int,
    communicator: Communicator | None = None,
) -> torch.Tensor:
    """Log of the balanced assignment of each view's batch, per head.

    Starts from exp(logits / temperature) and alternates: each cluster's mass to 1/K, each image's to 1/B; then scales
    by B, so that every row is a distribution. All in log space: nothing overflows.

    Args:
        logits_VHBK: float32, views x heads x this worker's images x clusters.
        temperature: T_sk.
        num_iterations: alternations.
        communicator: sums over the workers that share the batch.

    Returns:
        float32, same shape; logsumexp over the last axis is 0.
    """
    communicator = communicator or SingleWorker()
    log_q = logits_VHBK / temperature
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
