from __future__ import annotations

import pytest
import torch

from icce_ray.heads.sinkhorn import sinkhorn_log_targets

from .reference import sinkhorn


def test_equals_the_plain_alternation_per_view_and_head() -> None:
    logits = torch.rand(2, 3, 40, 6) * 2 - 1
    targets = sinkhorn_log_targets(logits, 0.1, 3).exp()
    for view in range(2):
        for head in range(3):
            expected = sinkhorn(logits[view, head], 0.1, 3)
            torch.testing.assert_close(targets[view, head], expected, rtol=1e-4, atol=1e-6)


def test_many_iterations_give_every_cluster_the_same_mass() -> None:
    targets = sinkhorn_log_targets(torch.randn(1, 1, 60, 4), 0.3, 200).exp()[0, 0]
    torch.testing.assert_close(targets.sum(dim=0), torch.full((4,), 15.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(60))


@pytest.mark.parametrize("temperature", [1e-3, 1e-4])
def test_small_temperatures_do_not_overflow(temperature: float) -> None:
    log_targets = sinkhorn_log_targets(torch.rand(2, 1, 30, 5) * 2 - 1, temperature, 3)
    assert torch.isfinite(log_targets.exp()).all()
    torch.testing.assert_close(log_targets.exp().sum(dim=-1), torch.ones(2, 1, 30))
