from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.loss import icce_losses, scan_losses

NUM_PAIRS = 9


def cosines(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, NUM_PAIRS, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1


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
def test_icces_loss_and_its_written_out_gradient_are_the_formulas(ce_weight: float) -> None:
    student, log_targets = cosines(0).double().requires_grad_(), torch.log_softmax(cosines(1).double() / 0.1, dim=-1)
    prior, weight = torch.rand(3, 5).double() + 0.1, torch.rand(NUM_PAIRS).double()
    expected = plain_temi(student, log_targets, prior, weight, ce_weight)
    expected.sum().backward()
    ours = icce_losses(
        student.detach(), log_targets, prior.log(), weight, torch.tensor(ce_weight).double(), HeadsConfig()
    )
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
    ours = scan_losses(student.detach(), HeadsConfig(loss="scan"))
    torch.testing.assert_close(ours.loss_H, expected.detach())
    torch.testing.assert_close(ours.gradient_VHBK, student.grad)


def test_without_a_weight_there_is_no_cross_entropy() -> None:
    student, log_targets = cosines(0), torch.log_softmax(cosines(1) / 0.1, dim=-1)
    arguments = (student, log_targets, torch.zeros(3, 5), torch.ones(NUM_PAIRS))
    off = icce_losses(*arguments, torch.tensor(0.7), HeadsConfig(max_ce_weight=0.0))
    zero = icce_losses(*arguments, torch.tensor(0.0), HeadsConfig(max_ce_weight=0.3))
    assert torch.equal(off.loss_H, zero.loss_H)
    assert torch.equal(off.gradient_VHBK, zero.gradient_VHBK)
