from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from icce_ray.config import HeadsConfig, NeighborsConfig
from icce_ray.methods.clusterings import Clusterings
from icce_ray.methods.heads import balance
from icce_ray.methods.heads.balance import has_too_many_empty, move_balance, renew_prototypes
from icce_ray.methods.heads.fit import fit
from icce_ray.methods.heads.model import forward
from icce_ray.methods.heads.state import HeadState
from icce_ray.metrics.contingency import size_agreement
from icce_ray.neighbors.graph import build_graph

from .workers import make_trainer, small_settings


def test_a_head_may_have_half_of_few_clusters_empty_and_a_twentieth_of_many() -> None:
    for num_clusters, allowed in ((4, 2), (10, 5), (30, 8), (100, 8), (200, 10)):
        sizes_HK = torch.ones((2, num_clusters))
        sizes_HK[0, :allowed] = 0
        sizes_HK[1, : allowed + 1] = 0
        assert has_too_many_empty(sizes_HK).tolist() == [False, True]


def test_the_balance_falls_in_the_first_half_of_training_and_rises_where_clusters_are_empty() -> None:
    balance_H = torch.ones(3)
    balances = []
    for epoch in range(20):
        move_balance(balance_H, torch.tensor([False, epoch in (0, 2), epoch in (9, 19)]), epoch, 20)
        balances.append(balance_H.tolist())
    expected = [[0.75, 1, 0.75], [0.5, 0.75, 0.5], [0.25, 0.95, 0.25], [0, 0.7, 0]]
    torch.testing.assert_close(torch.tensor(balances[:4]), torch.tensor(expected))
    last = [[0, 0, 0.2], [0, 0, 0.2], [0, 0, 0.4]]
    torch.testing.assert_close(torch.tensor([balances[9], balances[10], balances[19]]), torch.tensor(last))


def test_heads_agree_about_sizes_if_the_same_images_lie_in_large_clusters() -> None:
    generator = np.random.default_rng(0)
    labels_HN = np.array([generator.choice(5, 300, p=[0.5, 0.2, 0.15, 0.1, 0.05]) for _ in range(3)])
    labels_HN[1, :200] = labels_HN[0, :200]
    logs_HN = [np.log([(labels_N == label).sum() for label in labels_N]) for labels_N in labels_HN]
    expected = np.corrcoef(logs_HN)[np.triu_indices(3, 1)].mean()
    assert 0.1 < expected < 0.9
    assert size_agreement(labels_HN) == pytest.approx(expected, abs=1e-6)
    renamed_HN = np.stack([generator.permutation(5)[labels_N] for labels_N in labels_HN])
    assert size_agreement(renamed_HN) == size_agreement(labels_HN)
    assert size_agreement(np.stack([labels_HN[0], labels_HN[0]])) == pytest.approx(1.0)
    equal = np.repeat(np.arange(5), 60)
    assert size_agreement(np.stack([labels_HN[0], equal])) == 0.0  # says nothing about sizes
    assert size_agreement(labels_HN[:1]) == 1.0


def test_empty_clusters_get_prototypes_at_images_far_from_all_others() -> None:
    generator = torch.Generator().manual_seed(0)
    state = HeadState.initialise(small_settings(bottleneck_dim=16), range(3), 6, 5, 0, torch.device("cpu"))
    for moments in (state.moments.mean, state.moments.square):
        moments.prototypes_HKP.fill_(1.0)
    # Images in two directions. The prototypes of the first head are all at the first, so only the second is far.
    inputs = torch.randn(2, 6, generator=generator).repeat_interleave(20, dim=0)
    inputs += 0.01 * torch.randn(inputs.shape, generator=generator)
    cache = forward(state.teacher, inputs)
    unit_HnP = cache.bottleneck_HnP * cache.inverse_norm_Hn1
    state.teacher.prototypes_HKP[0] = unit_HnP[0, 0] * 0.3
    before = HeadState(
        *(part.map(torch.clone) for part in (state.student, state.teacher)),
        state.moments,
        state.prior_HK,
        state.balance_H,
    )
    sizes_HK = torch.tensor([[20, 0, 7, 5, 8], [9, 0, 30, 1, 0], [0, 0, 20, 20, 0]])
    renew_prototypes(state, inputs, sizes_HK, [[0, 0], [0, 1], None])

    renewed = state.teacher.prototypes_HKP[0, 1]
    assert renewed.norm().item() == pytest.approx(0.3, rel=1e-5)
    assert (unit_HnP[0, 20:] @ renewed / renewed.norm()).max().item() == pytest.approx(1.0, abs=1e-5)
    own = state.teacher.prototypes_HKP[1, [1, 4]]
    nearest = (unit_HnP[1] @ torch.nn.functional.normalize(own, dim=-1).T).argmax(dim=0) // 20
    assert sorted(nearest.tolist()) == [0, 1]  # the second image drawn is far from the first
    for ours, old in ((state.student, before.student), (state.teacher, before.teacher)):
        changed_HK = (ours.prototypes_HKP != old.prototypes_HKP).any(dim=-1)
        assert torch.equal(changed_HK, (sizes_HK == 0) & torch.tensor([[True], [True], [False]]))
        assert torch.equal(ours.hidden_weight_HMS, old.hidden_weight_HMS)
    for moments in (state.moments.mean, state.moments.square):
        assert torch.equal((moments.prototypes_HKP == 0).all(dim=-1), changed_HK)


def planted(sizes: list[int], dim: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    centres = generator.normal(size=(len(sizes), dim)) * spread
    return (centres[labels] + generator.normal(size=(len(labels), dim))).astype(np.float32), labels


def train(features: np.ndarray, num_clusters: int, **changes: object) -> Clusterings:
    settings = small_settings(hidden_dim=64, bottleneck_dim=32, teacher_momentum="auto", **changes)
    graph, _ = build_graph(features, NeighborsConfig(similarity_threshold=None), num_clusters=num_clusters, seed=0)
    return fit(features, graph, settings, num_clusters=num_clusters, seed=0)


def test_many_clusters_of_weak_features_are_used() -> None:
    """Without balance, all heads collapse."""
    features, _ = planted([10] * 100, 24, 0.7)
    used = {}
    for setting in (0.0, "auto"):
        labels_HN = train(features, 100, num_heads=1, num_epochs=20, batch_size=256, balance=setting).labels_HN
        used[setting] = len(np.unique(labels_HN))
    assert used["auto"] >= 90
    assert used[0.0] < 50


def test_unequal_groups_are_found() -> None:
    features, labels = planted([260, 80, 30, 12], 16, 1.2)
    scores = {}
    for setting in (1.0, "auto"):
        trained = train(features, 4, num_heads=2, num_epochs=30, balance=setting)
        scores[setting] = np.mean([adjusted_rand_score(labels, head) for head in trained.labels_HN])
    assert scores["auto"] > scores[1.0] + 0.3
    assert trained.history[-1]["balance"] == 0.0


def test_heads_that_disagree_about_sizes_are_balanced_again() -> None:
    """Noise has no groups, so each head makes other clusters large."""
    features = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    history = train(features, 6, num_heads=4, num_epochs=20, balance="auto").history
    compared = [epoch["epoch"] for epoch in history if epoch["size_agreement"] is not None]
    assert compared == [12]
    assert [round(epoch["balance"], 2) for epoch in history[3:]] == [0.0] * 9 + [0.2, 0.4, 0.6, 0.8] + [1.0] * 4


def balanced(graph_of: Any, *, epoch: int, size_agreement: float | None) -> tuple[list[float], list[bool]]:
    """The balance of three heads after an epoch (from 0) of 20, and which of them have new prototypes. Before it, they
    have no empty cluster and no balance, one empty cluster and no balance, and no empty cluster and a little balance.
    The agreement about sizes is that of epoch 12."""
    trainer = make_trainer(graph_of, small_settings(num_epochs=20, balance="auto"))
    trainer.epoch = epoch
    trainer.history = [{"size_agreement": size_agreement if number == 12 else None} for number in range(1, epoch + 1)]
    trainer.state.balance_H.copy_(torch.tensor([0.0, 0.0, 0.1]))
    trainer.watch.sizes_HK.copy_(torch.tensor([[50, 50, 50, 50], [0, 100, 50, 50], [20, 80, 50, 50]]))
    before_HKP = trainer.state.teacher.prototypes_HKP.clone()
    trainer._find_balance()
    renewed_H = (trainer.state.teacher.prototypes_HKP != before_HKP).any(dim=-1).any(dim=-1)
    return [round(balance, 6) for balance in trainer.state.balance_H.tolist()], renewed_H.tolist()


def test_after_the_comparison_heads_that_lost_clusters_or_have_some_balance_get_more_if_sizes_disagree(planted) -> None:
    rest, raised = [0.0, 0.0, 0.1], [0.0, 0.2, 0.3]
    for epoch, agreement, expected in ((11, None, rest), (12, 0.0, raised), (15, 0.0, raised), (12, 1.0, rest)):
        assert balanced(planted, epoch=epoch, size_agreement=agreement) == (expected, [False] * 3), epoch


def test_prototypes_are_not_renewed_in_the_last_part_of_the_training(planted, monkeypatch) -> None:
    monkeypatch.setattr(balance, "MAX_NUM_EMPTY", 0)
    for epoch, renews in ((0, True), (13, True), (14, False), (19, False)):
        assert balanced(planted, epoch=epoch, size_agreement=1.0)[1] == [False, renews, False], epoch


def test_the_balance_is_found_where_there_is_one() -> None:
    assert HeadsConfig(balance="auto").finds_balance
    for other in ({"balance": 0.5}, {"sinkhorn": False}, {"loss": "scan"}):
        assert not HeadsConfig.model_validate({"balance": "auto"} | other).finds_balance
