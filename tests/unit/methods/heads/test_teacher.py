from __future__ import annotations

import torch

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.teacher import (
    moved_prior,
    pair_agreement,
    pair_weights,
    smooth_over_neighbors,
    teacher_targets,
)

from .reference import sinkhorn


def cosines(num_views: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(num_views, 3, 40, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_targets_are_sinkhorns_for_icce_and_a_softmax_for_temi() -> None:
    z_VHBK, balance_H = cosines(2), torch.tensor([1.0, 0.4, 0.7])
    q_VHBK, log_q_VHBK = teacher_targets(z_VHBK, balance_H, HeadsConfig(sinkhorn_iterations=2, teacher_temperature=0.2))
    torch.testing.assert_close(q_VHBK[1, 2], sinkhorn(z_VHBK[1, 2], 0.2, 2, 0.7), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(log_q_VHBK, q_VHBK.log(), rtol=1e-4, atol=1e-4)
    q_VHBK, _ = teacher_targets(z_VHBK, balance_H, HeadsConfig(sinkhorn=False, teacher_temperature=0.2))
    torch.testing.assert_close(q_VHBK, torch.softmax(z_VHBK / 0.2, dim=-1))


def test_the_target_of_several_neighbours_is_their_mean() -> None:
    q_VHBK = torch.softmax(cosines(4), dim=-1)
    smooth, log_smooth = smooth_over_neighbors(q_VHBK, q_VHBK.log())
    assert torch.equal(smooth[0], q_VHBK[0])
    torch.testing.assert_close(smooth[1], (q_VHBK[1] + q_VHBK[2] + q_VHBK[3]) / 3)
    torch.testing.assert_close(log_smooth, smooth.log())
    one = smooth_over_neighbors(q_VHBK[:2], q_VHBK[:2].log())[0]
    assert torch.equal(one, q_VHBK[:2])


def test_the_prior_moves_towards_the_mean_target_over_images_and_views() -> None:
    q_VHBK = torch.softmax(cosines(3), dim=-1)
    moved = moved_prior(torch.full((3, 5), 0.2), q_VHBK, 0.9)
    torch.testing.assert_close(moved, 0.9 * torch.full((3, 5), 0.2) + 0.1 * q_VHBK.mean(dim=(0, 2)))


def test_a_pair_weighs_as_much_as_the_heads_agree_that_it_is_one() -> None:
    q_VHBK = torch.softmax(cosines(2) * 5, dim=-1)
    agreement_HB = pair_agreement(q_VHBK)
    torch.testing.assert_close(agreement_HB[2, 7], (q_VHBK[0, 2, 7] * q_VHBK[1, 2, 7]).sum())
    torch.testing.assert_close(pair_weights(agreement_HB), agreement_HB.mean(dim=0))


def test_heads_are_added_in_their_order() -> None:
    """In float32, ((1 + 1e8) - 1e8) is 0 and (1 + (1e8 - 1e8)) is 1."""
    assert pair_weights(torch.tensor([[1.0], [1e8], [-1e8], [3.0]])).tolist() == [0.75]
