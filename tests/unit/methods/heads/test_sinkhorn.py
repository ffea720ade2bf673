from __future__ import annotations

import pytest
import torch

from icce_ray.methods.heads.sinkhorn import sinkhorn_targets

from .reference import sinkhorn


def test_equals_the_plain_alternation_per_view_and_head() -> None:
    logits = torch.rand(2, 3, 40, 6) * 2 - 1
    targets, log_targets = sinkhorn_targets(logits, 0.1, 3)
    torch.testing.assert_close(log_targets, targets.log(), rtol=0, atol=1e-4)
    for view in range(2):
        for head in range(3):
            expected = sinkhorn(logits[view, head], 0.1, 3)
            torch.testing.assert_close(targets[view, head], expected, rtol=1e-4, atol=1e-6)


def uniform_sinkhorn(cosines_VHBK: torch.Tensor, temperature: float, num_iterations: int) -> torch.Tensor:
    """With clusters forced to equal mass, in the order of operations that gives the same bits."""
    kernel = ((cosines_VHBK - 1.0) / temperature).flatten(0, 1).exp()
    row_scale = torch.ones_like(kernel[..., :1])
    for _ in range(num_iterations):
        column_scale = 1 / torch.bmm(kernel.transpose(1, 2), row_scale)
        column_scale = column_scale / column_scale.amax(dim=1, keepdim=True)
        row_scale = 1 / torch.bmm(kernel, column_scale)
    return (kernel * row_scale * column_scale.transpose(1, 2)).view_as(cosines_VHBK)


def test_full_balance_gives_the_bits_of_equal_marginals() -> None:
    cosines = torch.rand(2, 3, 40, 6) * 2 - 1
    expected = uniform_sinkhorn(cosines, 0.1, 3)
    assert torch.equal(sinkhorn_targets(cosines, 0.1, 3)[0], expected)
    torch.testing.assert_close(sinkhorn_targets(cosines, 0.1, 3, torch.ones(3))[0], expected)


@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_each_head_has_its_own_balance(temperature: float) -> None:
    cosines = torch.rand(2, 3, 40, 6) * 2 - 1
    targets, log_targets = sinkhorn_targets(cosines, temperature, 3, torch.tensor([0.0, 0.3, 1.0]))
    torch.testing.assert_close(log_targets.exp(), targets)
    torch.testing.assert_close(targets[:, 0], torch.softmax(cosines[:, 0] / temperature, dim=-1))
    for head, balance in ((1, 0.3), (2, 1.0)):
        expected = sinkhorn(cosines[1, head], temperature, 3, balance)
        torch.testing.assert_close(targets[1, head], expected, rtol=1e-4, atol=1e-6)


def test_many_iterations_give_every_cluster_the_same_mass() -> None:
    targets = sinkhorn_targets(torch.rand(1, 1, 60, 4) * 2 - 1, 0.3, 200)[0][0, 0]
    torch.testing.assert_close(targets.sum(dim=0), torch.full((4,), 15.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(60))


@pytest.mark.parametrize("temperature", [1e-3, 1e-4])
def test_small_temperatures_do_not_overflow(temperature: float) -> None:
    targets, log_targets = sinkhorn_targets(torch.rand(2, 1, 30, 5) * 2 - 1, temperature, 3)
    assert torch.isfinite(log_targets).all()
    torch.testing.assert_close(targets.sum(dim=-1), torch.ones(2, 1, 30))


def test_scaling_and_logarithms_give_the_same_where_both_can(monkeypatch: pytest.MonkeyPatch) -> None:
    cosines = torch.rand(2, 3, 50, 7) * 2 - 1
    scaled = sinkhorn_targets(cosines, 0.05, 3)
    monkeypatch.setattr("icce_ray.methods.heads.sinkhorn.MAX_EXPONENT", 0.0)
    for ours, theirs in zip(scaled, sinkhorn_targets(cosines, 0.05, 3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
