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
