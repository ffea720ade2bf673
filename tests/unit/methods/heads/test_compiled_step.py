from __future__ import annotations

import logging
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from icce_ray.config import HeadsConfig, method_settings
from icce_ray.methods import METHODS
from icce_ray.methods.heads import compiled_step
from icce_ray.methods.heads.compiled_step import HALF, PLAIN, choose_passes, compiled_passes
from icce_ray.methods.heads.fit import fit
from icce_ray.methods.heads.model import PrototypeDtypes
from icce_ray.methods.heads.step import Passes
from icce_ray.methods.heads.trainer import HeadTrainer
from icce_ray.metrics.true_label_scores import clustering_accuracy

from .workers import make_trainer, small_settings


@pytest.fixture(autouse=True)
def _few_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method_settings, "MIN_INPUTS", 4)


def trainer_on_blocks(planted, settings: HeadsConfig, passes: Passes, monkeypatch: pytest.MonkeyPatch) -> HeadTrainer:
    """A trainer on this CPU with the blocks of a GPU."""
    from icce_ray.methods.heads import division

    monkeypatch.setattr("icce_ray.methods.heads.trainer.choose_passes", lambda *arguments: passes)
    blocks = division.head_blocks(settings.num_heads, on_gpu=True)
    with monkeypatch.context() as patched:
        patched.setattr(division, "head_blocks", lambda num_heads, on_gpu: blocks)
        return make_trainer(planted, settings)


def plain_trainer(planted, settings: HeadsConfig, monkeypatch: pytest.MonkeyPatch) -> HeadTrainer:
    monkeypatch.setattr("icce_ray.methods.heads.trainer.choose_passes", lambda *arguments: PLAIN)
    return make_trainer(planted, settings)


def assert_trains_as_on_a_cpu(planted, settings: HeadsConfig, passes: Passes, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = plain_trainer(planted, settings, monkeypatch)
    ours = trainer_on_blocks(planted, settings, passes, monkeypatch)
    assert [block.heads for block in ours.blocks] == [slice(0, 2), slice(2, 5)]
    for _ in range(settings.num_epochs):
        plain.train_epoch()
        ours.train_epoch()
        np.testing.assert_allclose(ours.head_losses_H, plain.head_losses_H, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(ours.state.prior_HK, plain.state.prior_HK, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.watch.sizes_HK, plain.watch.sizes_HK)
    for mine, theirs in zip(ours.state.teacher.tensors(), plain.state.teacher.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"input_share": 1.0}, METHODS["temi"].settings["heads"], {"loss": "scan"}])
def test_several_heads_computed_together_give_the_numbers_of_single_ones(
    planted, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings(**{"num_heads": 5, "num_epochs": 4} | changes)
    assert_trains_as_on_a_cpu(planted, settings, PLAIN, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, METHODS["temi"].settings["heads"], {"loss": "scan"}])
def test_the_compiler_can_trace_the_passes_without_a_break(
    planted, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings(**{"num_heads": 5, "num_epochs": 2} | changes)
    passes = compiled_passes(PrototypeDtypes(), "aot_eager")
    assert_trains_as_on_a_cpu(planted, settings, passes, monkeypatch)


def test_half_precision_finds_the_same_clusters(planted, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small_settings(num_heads=5, num_epochs=6)
    trainers = [
        plain_trainer(planted, settings, monkeypatch),
        trainer_on_blocks(planted, settings, replace(PLAIN, dtypes=HALF), monkeypatch),
    ]
    labels = []
    for trainer in trainers:
        for _ in range(settings.num_epochs):
            trainer.train_epoch()
        labels.append(trainer.label_matrix())
    accuracies = [[clustering_accuracy(planted[2], head) for head in matrix] for matrix in labels]
    assert np.mean(accuracies[1]) >= np.mean(accuracies[0]) - 0.01
    assert np.mean(labels[0] == labels[1]) > 0.99
    losses = [trainer.head_losses_H for trainer in trainers]
    np.testing.assert_allclose(*losses, rtol=1e-2)
    assert not np.array_equal(*losses)


def test_a_cpu_takes_the_plain_passes(planted) -> None:
    trainer = make_trainer(planted, small_settings(precision="bfloat16"))
    assert trainer.blocks[0].passes is PLAIN


def test_a_machine_that_cannot_compile_trains_by_the_plain_passes(
    planted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*arguments: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    inputs = MagicMock()
    inputs.batch_nD.__len__.return_value = 128
    inputs.batch_nD.device, inputs.batch_nD.dtype = torch.device("cuda"), torch.bfloat16
    trainer = make_trainer(planted, small_settings())
    states, slices = [block.state for block in trainer.blocks], [block.heads for block in trainer.blocks]
    monkeypatch.setattr(compiled_step, "compiled_passes", lambda dtypes: Passes(no_compiler, no_compiler, dtypes))
    with caplog.at_level(logging.WARNING):
        assert choose_passes(trainer.settings, states, inputs, slices, num_steps=10**12) is PLAIN
    assert "Failed to find C compiler" in caplog.text
    caplog.clear()
    assert choose_passes(trainer.settings, states, inputs, slices, num_steps=10) is PLAIN
    assert not caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_trains_as_a_cpu_does(planted, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 by the plain passes, in bfloat16 by the compiled ones: the CPU's losses, to what the precision
    allows."""
    monkeypatch.setattr(compiled_step, "MIN_COMPILED_WORK", 0)
    settings = small_settings(num_heads=5, num_epochs=6)
    cpu = make_trainer(planted, settings)
    gpu = make_trainer(planted, settings.model_copy(update={"precision": precision}), device=torch.device("cuda"))
    assert (gpu.blocks[0].passes is PLAIN) == (precision == "float32")
    tolerance = 1e-4 if precision == "float32" else 2e-2
    for _ in range(settings.num_epochs):
        cpu.train_epoch()
        gpu.train_epoch()
        np.testing.assert_allclose(gpu.head_losses_H, cpu.head_losses_H, rtol=tolerance, atol=tolerance)
    agreement = np.mean(gpu.label_matrix() == cpu.label_matrix())
    assert agreement >= (0.995 if precision == "float32" else 0.98)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_workers_on_a_gpu_give_the_bits_of_one(planted, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from .workers import fit_on_workers

    monkeypatch.setattr(compiled_step, "MIN_COMPILED_WORK", 0)
    features, graph, _ = planted
    settings = small_settings(num_heads=10, num_epochs=4, precision=precision)
    alone = fit(features, graph, settings, num_clusters=4, seed=0, device="cuda")
    for num_workers in (2, 3):
        first = fit_on_workers(num_workers, features, graph, settings, device="cuda")[0]
        assert np.array_equal(first.labels_HN, alone.labels_HN)
        assert first.files == alone.files
