from __future__ import annotations

import numpy as np
import pytest
import torch

from icce_ray.config import method_settings
from icce_ray.methods import METHODS
from icce_ray.methods.heads.optimizer import teacher_momentum
from icce_ray.methods.heads.pair_batches import epoch_batches

from .reference import ReferenceTrainer
from .workers import make_trainer, small_settings


@pytest.mark.parametrize("method", ["icce", "temi"])
def test_losses_per_head_are_those_of_the_plain_transcription(
    planted, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method_settings, "MIN_INPUTS", 4)
    graph = planted[1]
    settings = small_settings(**METHODS[method].settings.get("heads", {}))
    trainer = make_trainer(planted, settings)
    student = trainer.state.student
    assert student.hidden_weight_HMS.shape[2] == (6 if method == "icce" else 12)
    reference = ReferenceTrainer(student.map(torch.clone), settings, trainer.steps_per_epoch, trainer.columns_hS)
    step = 0
    for epoch in range(settings.num_epochs):
        expected = np.zeros(settings.num_heads)
        for rows in epoch_batches(graph, settings.batch_size, 1, 0, epoch):
            views = trainer.norm.normalise_batch(trainer.norm.gather(rows.ravel())).chunk(2)
            expected += rows.shape[1] * np.array(reference.step(*views, step)) / graph.num_images
            step += 1
        trainer.train_epoch()
        np.testing.assert_allclose(trainer.head_losses_H, expected, rtol=1e-5, atol=1e-5)
    assert step == 21
    # AdamW hardly depends on the scale of the gradient. Its moments do.
    for head, optimizer in enumerate(reference.optimizers):
        expected_mean = optimizer.state[reference.students[head].hidden.weight]["exp_avg"]
        mean = trainer.state.moments.mean.hidden_weight_HMS[head]
        torch.testing.assert_close(mean, expected_mean, rtol=1e-3, atol=1e-3 * float(expected_mean.abs().max()))


def test_the_prototypes_rest_while_they_are_frozen(planted) -> None:
    trainer = make_trainer(planted, small_settings(freeze_last_layer_epochs=1))
    before = trainer.state.student.prototypes_HKP.clone()
    trainer.train_epoch()
    assert torch.equal(trainer.state.student.prototypes_HKP, before)
    trainer.train_epoch()
    assert not torch.equal(trainer.state.student.prototypes_HKP, before)


def test_a_loss_that_is_not_finite_is_reported_with_what_led_to_it(planted) -> None:
    trainer = make_trainer(planted, small_settings())
    trainer.state.student.prototypes_HKP[1, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"heads \[1\] is not finite in epoch 0, step 0 of 3 \(learning rate"):
        trainer.train_epoch()


def test_the_history_has_the_figures_of_every_epoch(planted) -> None:
    trainer = make_trainer(planted, small_settings(num_epochs=40))
    for _ in range(3):
        trainer.train_epoch()
    first, second, third = trainer.history
    assert [epoch["epoch"] for epoch in trainer.history] == [1, 2, 3]
    assert first["label_change"] is None
    assert first["head_nmi"] is None
    assert 0.0 < second["head_nmi"] < 1.0  # every second epoch of 40
    labels = trainer.watch.previous_Hw.clone()
    trainer.train_epoch()
    moved = (trainer.watch.previous_Hw != labels).double().mean()
    assert trainer.history[-1]["label_change"] == pytest.approx(float(moved))
    assert third["loss"] == pytest.approx(np.mean(third["head_losses"]), abs=1e-6)
    assert third["best_head_loss"] == pytest.approx(min(third["head_losses"]), abs=1e-6)
    # Two epochs of warm-up; the last of three batches has 66 pairs.
    assert second["learning_rate"] == pytest.approx(1e-2 * 66 / 256)


def test_the_automatic_momentum_remembers_a_share_of_short_runs_and_is_the_papers_in_long_ones() -> None:
    assert teacher_momentum(small_settings(teacher_momentum="auto", num_epochs=100), 10) == pytest.approx(1 - 1 / 50)
    assert teacher_momentum(small_settings(teacher_momentum="auto", num_epochs=400), 1250) == pytest.approx(0.996)
    assert teacher_momentum(small_settings(teacher_momentum=0.9), 10) == 0.9
