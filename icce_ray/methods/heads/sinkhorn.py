"""Sinkhorn-Knopp: teacher targets that spread a batch evenly over the clusters (docs/METHOD.md, "Sinkhorn-Knopp")."""

from __future__ import annotations

import torch

MAX_EXPONENT = 40.0
"""Up to this x, exp(-x) and the product of two such numbers are normal float32 numbers."""


def sinkhorn_targets(
    cosines_VHBK: torch.Tensor, temperature: float, num_iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The balanced assignment of each view's batch, for each head.

    Starts from exp(cosines / temperature) and alternates: each cluster's mass becomes 1/K, then each image's 1/B. The
    result is scaled by B, so that every row is a distribution. The alternation only scales rows and columns, so the
    exponentials are taken once and each half step is a matrix-vector product. At low temperatures, where exponentials
    underflow, it works on logarithms instead.

    Args:
        cosines_VHBK: float32 in -1..1, views x heads x images x clusters.
        temperature: T_sk.
        num_iterations: number of alternations.

    Returns:
        The assignment, whose rows sum to 1, and its logarithm; float32, shaped like `cosines_VHBK`.
    """
    if 2.0 / temperature > MAX_EXPONENT:
        log_q_VHBK = _on_logarithms(cosines_VHBK / temperature, num_iterations)
        return log_q_VHBK.exp(), log_q_VHBK
    log_q = ((cosines_VHBK - 1.0) / temperature).flatten(0, 1)
    kernel = log_q.exp()
    row_scale = torch.ones_like(kernel[..., :1])
    for _ in range(num_iterations):
        column_scale = torch.bmm(kernel.transpose(1, 2), row_scale).reciprocal_()
        # Rows and columns could grow and shrink by a common factor with every iteration; this fixes it.
        column_scale /= column_scale.amax(dim=1, keepdim=True)
        row_scale = torch.bmm(kernel, column_scale).reciprocal_()
    column_scale = column_scale.transpose(1, 2)
    q = kernel.mul_(row_scale).mul_(column_scale)
    log_q.add_(row_scale.log()).add_(column_scale.log())
    return q.view_as(cosines_VHBK), log_q.view_as(cosines_VHBK)


def _on_logarithms(log_q: torch.Tensor, num_iterations: int) -> torch.Tensor:
    for _ in range(num_iterations):
        log_q = log_q - torch.logsumexp(log_q, dim=-2, keepdim=True)
        log_q = torch.log_softmax(log_q, dim=-1)
    return log_q
