"""Sinkhorn-Knopp: teacher targets that spread a batch over the clusters (docs/METHOD.md, "Sinkhorn-Knopp")."""

import torch

MAX_EXPONENT = 40.0
"""Up to this x, exp(-x) and the product of two such numbers are normal float32 numbers."""


def sinkhorn_targets(
    cosines_VHBK: torch.Tensor, temperature: float, num_iterations: int, balance_H: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The balanced assignment of each view's batch, for each head.

    Starts from exp(cosines / temperature) and alternates: each cluster's mass becomes 1/K, then each image's 1/B. The
    result is scaled by B, so that every row is a distribution. With `balance_H`, the scale of a cluster is raised to
    this power: 1 forces equal masses, 0 leaves the softmax of each image. The alternation only scales rows and columns,
    so the exponentials are taken once and each half step is a matrix-vector product. At low temperatures, where
    exponentials underflow, it works on logarithms instead. Returns the assignment, whose rows sum to 1, and its
    logarithm; float32, shaped like `cosines_VHBK`.

    Args:
        cosines_VHBK: float32 in -1..1, views x heads x images x clusters.
        balance_H: 0 to 1 for each head; None: 1.
    """
    if 2.0 / temperature > MAX_EXPONENT:
        log_q_VHBK = _on_logarithms(cosines_VHBK / temperature, num_iterations, balance_H)
        return log_q_VHBK.exp(), log_q_VHBK
    log_q = ((cosines_VHBK - 1.0) / temperature).flatten(0, 1)
    kernel = log_q.exp()
    row_scale = torch.ones_like(kernel[..., :1])
    power = None if balance_H is None else balance_H.repeat(len(cosines_VHBK)).view(-1, 1, 1)
    for _ in range(num_iterations):
        column_scale = torch.bmm(kernel.transpose(1, 2), row_scale).reciprocal_()
        # Rows and columns could grow and shrink by a common factor with every iteration; this fixes it.
        column_scale /= column_scale.amax(dim=1, keepdim=True)
        if power is not None:
            column_scale.pow_(power)
        row_scale = torch.bmm(kernel, column_scale).reciprocal_()
    column_scale = column_scale.transpose(1, 2)
    q = kernel.mul_(row_scale).mul_(column_scale)
    log_q.add_(row_scale.log()).add_(column_scale.log())
    return q.view_as(cosines_VHBK), log_q.view_as(cosines_VHBK)


def _on_logarithms(log_kernel: torch.Tensor, num_iterations: int, balance_H: torch.Tensor | None) -> torch.Tensor:
    log_row_scale = torch.zeros_like(log_kernel[..., :1])
    for _ in range(num_iterations):
        log_column_scale = -torch.logsumexp(log_kernel + log_row_scale, dim=-2, keepdim=True)
        if balance_H is not None:
            log_column_scale = log_column_scale * balance_H.view(-1, 1, 1)
        log_row_scale = -torch.logsumexp(log_kernel + log_column_scale, dim=-1, keepdim=True)
    return torch.log_softmax(log_kernel + log_column_scale, dim=-1)
