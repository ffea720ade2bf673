from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from icce_ray.config import HeadsConfig
from icce_ray.config import schema as config_module
from icce_ray.methods import METHODS
from icce_ray.methods.heads import fused
from icce_ray.methods.heads.fused import FusedStep, can_fuse, compiled_step
from icce_ray.methods.heads.model import HeadParameters
from icce_ray.methods.heads.training import HeadTrainer, train_heads
from icce_ray.metrics.true_label_scores import clustering_accuracy

from .test_training import settings, train_in_threads

GPU = torch.device("cuda")


def config_for(**changes: object) -> HeadsConfig:
    return settings(**{"num_heads": 5, "num_epochs": 6} | changes)


def trainer_for(planted, config: HeadsConfig, step: FusedStep | None) -> HeadTrainer:
    features, graph, _ = planted
    trainer = HeadTrainer(features, graph, config, num_clusters=4, seed=0)
    trainer.fused = step
    return trainer


def in_float32(config: HeadsConfig) -> FusedStep:
    return FusedStep(config, compiled=False, cosine_dtype=torch.float32, gradient_dtype=torch.float32)


@pytest.fixture(autouse=True)
def _few_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "MIN_INPUTS", 4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"input_share": 1.0}, METHODS["temi"].settings["heads"], {"max_ce_weight": 2.0}, {"sinkhorn_iterations": 1}],
)
def test_the_fused_step_gives_the_numbers_of_the_plain_one(planted, changes: dict[str, object]) -> None:
    config = config_for(**changes)
    plain, ours = trainer_for(planted, config, None), trainer_for(planted, config, in_float32(config))
    # Several heads in a block, and blocks of unequal size.
    ours.blocks = [slice(0, 3), slice(3, 5)]
    for _ in range(config.num_epochs):
        plain.train_epoch()
        ours.train_epoch()
        np.testing.assert_allclose(ours.head_losses_H, plain.head_losses_H, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(ours.prior_HK, plain.prior_HK, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.watch.sizes_HK, plain.watch.sizes_HK)
    for mine, theirs in zip(ours.teacher.tensors(), plain.teacher.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_two_workers_follow_the_trajectory_of_one(planted, monkeypatch: pytest.MonkeyPatch) -> None:
    features, graph, _ = planted
    config = config_for(num_epochs=17)
    monkeypatch.setattr(HeadTrainer, "_compiled_step", lambda trainer: in_float32(trainer.config))
    alone = train_heads(features, graph, config, num_clusters=4, seed=0)
    for trained in train_in_threads(2, features, graph, config):
        ours, theirs = (np.array([epoch["head_losses"] for epoch in run.history]) for run in (trained, alone))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6)
        assert (trained.label_matrix_HN == alone.label_matrix_HN).mean() >= 0.995


def test_half_precision_finds_the_same_clusters(planted) -> None:
    config = config_for()
    labels = []
    for step in (None, FusedStep(config, compiled=False)):
        trainer = trainer_for(planted, config, step)
        for _ in range(config.num_epochs):
            trainer.train_epoch()
        labels.append(trainer.label_matrix())
    accuracies = [[clustering_accuracy(planted[2], head) for head in matrix] for matrix in labels]
    assert np.mean(accuracies[1]) >= np.mean(accuracies[0]) - 0.01
    assert np.mean(labels[0] == labels[1]) > 0.99


def test_only_what_the_fused_step_knows_is_given_to_it() -> None:
    assert can_fuse(HeadsConfig(), GPU, torch.bfloat16)
    assert not can_fuse(HeadsConfig(), torch.device("cpu"), torch.bfloat16)
    assert not can_fuse(HeadsConfig(), GPU, torch.float32)
    for changes in ({"loss": "scan"}, {"num_positives": 2}, {"teacher_temperature": 0.01}):
        assert not can_fuse(HeadsConfig.model_validate(changes), GPU, torch.bfloat16)


def test_a_machine_that_cannot_compile_trains_by_the_plain_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(function: object) -> object:
        def fails(*arguments: object) -> None:
            raise RuntimeError("Failed to find C compiler")

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(fused, "can_fuse", lambda *arguments: True)
    student = HeadParameters.initialise(2, 12, 16, 8, 4, seed=0)
    inputs = torch.ones(64, 12)
    with caplog.at_level(logging.WARNING):
        assert compiled_step(HeadsConfig(num_heads=2), student, inputs, num_steps=10**12) is None
    assert "Failed to find C compiler" in caplog.text
    caplog.clear()
    assert compiled_step(HeadsConfig(num_heads=2), student, inputs, num_steps=10) is None
    assert not caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_trains_as_a_cpu_does(planted, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 by the plain step, bfloat16 by the compiled one: the CPU's losses, to what the precision allows."""
    monkeypatch.setattr(fused, "MIN_COMPILED_WORK", 0)
    features, graph, _ = planted
    cpu = trainer_for(planted, config_for(), None)
    gpu = HeadTrainer(features, graph, config_for(precision=precision), num_clusters=4, seed=0, device="cuda")
    assert (gpu.fused is not None) == (precision == "bfloat16")
    tolerance = 1e-4 if precision == "float32" else 2e-2
    for _ in range(cpu.config.num_epochs):
        cpu.train_epoch()
        gpu.train_epoch()
        np.testing.assert_allclose(gpu.head_losses_H, cpu.head_losses_H, rtol=tolerance, atol=tolerance)
    agreement = np.mean(gpu.label_matrix() == cpu.label_matrix())
    assert agreement >= (0.995 if precision == "float32" else 0.98)
