from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.communicator import SingleWorker
from icce_ray.methods.heads.loss import scan_losses, temi_losses

NUM_PAIRS = 9


def cosines(seed: int, num_pairs: int = NUM_PAIRS) -> torch.Tensor:
    return torch.rand(2, 3, num_pairs, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plain_temi(
    student: torch.Tensor, log_targets: torch.Tensor, prior: torch.Tensor, weight: torch.Tensor, ce_weight: float
) -> torch.Tensor:
    """Sum over pairs, per head."""
    config = HeadsConfig()
    q, t = F.softmax(student / config.student_temperature, dim=-1), log_targets.exp()
    loss = torch.zeros(3, dtype=student.dtype)
    for view in range(2):
        shared = ((q[view] * t[1 - view]) ** config.beta / prior.unsqueeze(1)).sum(dim=-1)
        entropy = -q[view].log().gather(-1, t[1 - view].argmax(dim=-1, keepdim=True)).squeeze(-1)
        loss = loss + (-weight * shared.log() / 2 + ce_weight * entropy / 2).sum(dim=-1)
    return loss


@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
def test_temis_loss_and_its_written_out_gradient_are_the_formulas(ce_weight: float) -> None:
    student, log_targets = cosines(0).double().requires_grad_(), torch.log_softmax(cosines(1).double() / 0.1, dim=-1)
    prior, weight = torch.rand(3, 5).double() + 0.1, torch.rand(NUM_PAIRS).double()
    expected = plain_temi(student, log_targets, prior, weight, ce_weight)
    expected.sum().backward()
    ours = temi_losses(student.detach(), log_targets, prior.log(), weight, HeadsConfig(), ce_weight)
    torch.testing.assert_close(ours.loss_H, expected.detach())
    torch.testing.assert_close(ours.gradient_VHBK, student.grad)


def plain_scan(student: torch.Tensor, entropy_weight: float) -> torch.Tensor:
    """Sum over pairs, per head."""
    image, neighbor = F.softmax(student / 0.1, dim=-1)
    mean = image.mean(dim=1)
    entropy = -(mean * mean.log()).sum(dim=-1)
    return student.shape[2] * (-(image * neighbor).sum(dim=-1).log().mean(dim=-1) - entropy_weight * entropy)


def test_scans_loss_and_its_written_out_gradient_are_the_formulas() -> None:
    student = cosines(2).double().requires_grad_()
    expected = plain_scan(student, 5.0)
    expected.sum().backward()
    ours = scan_losses(student.detach(), NUM_PAIRS, HeadsConfig(loss="scan"), SingleWorker())
    torch.testing.assert_close(ours.loss_H, expected.detach())
    torch.testing.assert_close(ours.gradient_VHBK, student.grad)


class HalfOfTheBatch:
    """A worker that is told the other's sums."""

    rank, num_workers = 0, 2

    def __init__(self, others: torch.Tensor) -> None:
        self.others = others

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.add_(self.others)


def test_the_entropy_in_scans_loss_is_that_of_the_global_batch() -> None:
    student = cosines(3, 8)
    halves = student.split(4, dim=2)
    config = HeadsConfig(loss="scan")
    whole = scan_losses(student, 8, config, SingleWorker())
    sums = [F.softmax(half[0] / 0.1, dim=-1).sum(dim=1) for half in halves]
    parts = [scan_losses(half, 8, config, HalfOfTheBatch(sums[1 - rank])) for rank, half in enumerate(halves)]  # type: ignore[arg-type]
    torch.testing.assert_close(parts[0].loss_H + parts[1].loss_H, whole.loss_H)
    torch.testing.assert_close(torch.cat([part.gradient_VHBK for part in parts], dim=2), whole.gradient_VHBK)
