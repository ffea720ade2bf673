"""The trained runs against the paper's formulas, and whatever may not change a result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from icce_ray.config import TurtleConfig
from icce_ray.methods.turtle import feature_batches
from icce_ray.methods.turtle.feature_scaling import prepare_features
from icce_ray.methods.turtle.turtle_run import TurtleRun
from icce_ray.metrics.true_label_scores import clustering_accuracy
from icce_ray.runtime.threads import ThreadPool

from .transcription import plain_losses

CPU = torch.device("cpu")


def settings_of(**changes: Any) -> TurtleConfig:
    return TurtleConfig.model_validate({"num_steps": 50, "precision": "float32", "learning_rate": 0.02} | changes)


def make_run(sets: list[np.ndarray], settings: TurtleConfig, pool: ThreadPool, **changes: Any) -> TurtleRun:
    dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    spaces = [
        prepare_features(features, scale=settings.scale_features, seed=0, dtype=dtype, device=CPU, pool=pool)
        for features in sets
    ]
    return TurtleRun(spaces, settings, pool=pool, **{"num_clusters": 4, "seed": 0, "run": 0} | changes)


@pytest.mark.parametrize("warm_start", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    ("num_spaces", "changes"),
    [
        (1, {}),
        (1, {"scale_features": False, "inner_learning_rate": 1e-3}),
        (2, {"batch_size": 128}),
        (3, {"entropy_weight": 2.0, "inner_steps": 3}),
    ],
    ids=["scaled", "paper", "batches of a part", "three spaces"],
)
def test_the_losses_of_50_steps_are_those_of_the_formulas(
    planted, monkeypatch: pytest.MonkeyPatch, num_spaces: int, changes: dict[str, Any], warm_start: bool
) -> None:
    monkeypatch.setattr(feature_batches, "CHUNK_ROWS", 70)
    settings = settings_of(warm_start=warm_start, **changes)
    with ThreadPool(2) as pool:
        run, other = (make_run(planted[0][:num_spaces], settings, pool) for _ in range(2))

        def draws(step: int) -> TurtleRun:
            other.step = step
            return other

        def batch(step: int) -> list[torch.Tensor]:
            chunks = (draws(step)._whole or other._draw_batch()).chunks
            return [torch.cat(parts) for parts in zip(*(chunk.features_nD for chunk in chunks), strict=True)]

        expected = plain_losses(
            other.encoder.layers,
            lambda step: [tuple(parameters.tensors) for parameters in draws(step)._new_inner()],
            batch,
            num_steps=50,
            inner_steps=settings.inner_steps,
            learning_rate=settings.learning_rate,
            inner_rates=[settings.inner_rate(space.shape[1]) for space in run.spaces],
            entropy_weight=settings.entropy_weight,
            warm_start=warm_start,
        )
        losses = [run.train_step() for _ in range(50)]
    found = [(float(loss.prediction_error), float(loss.entropy)) for loss in losses]
    assert abs(expected[0][0] - expected[-1][0]) > 0.05, "the labels must have moved"
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_planted_clusters_are_found_in_any_unit(planted, precision: str) -> None:
    (features, *_), labels = planted
    for unit, offset in ((1.0, 0.0), (100.0, 500.0)):
        with ThreadPool(1) as pool:
            run = make_run([features * unit + offset], settings_of(num_steps=100, precision=precision), pool)
            for _ in range(100):
                run.train_step()
            assert clustering_accuracy(labels, run.labels()) > 0.97


def test_the_number_of_threads_does_not_change_a_bit(planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_batches, "CHUNK_ROWS", 37)
    found = []
    for num_threads in (1, 2, 3):
        with ThreadPool(num_threads) as pool:
            run = make_run(planted[0], settings_of(precision="bfloat16"), pool)
            losses = [float(run.train_step().prediction_error) for _ in range(8)]
            found.append((losses, run.tensors(), run.labels()))
    for losses, tensors, labels in found[1:]:
        assert losses == found[0][0]
        assert np.array_equal(labels, found[0][2])
        assert all(torch.equal(tensor, found[0][1][name]) for name, tensor in tensors.items())


def test_runs_differ_and_batches_differ_by_step(planted) -> None:
    with ThreadPool(1) as pool:
        settings = settings_of(batch_size=50)
        one, other = (make_run(planted[0][:1], settings, pool, run=run) for run in (0, 1))
        assert not torch.equal(one.encoder.layers[0][0], other.encoder.layers[0][0])
        first = one._draw_batch().chunks[0].features_nD[0]
        assert not torch.equal(first, other._draw_batch().chunks[0].features_nD[0])
        one.step = 1
        assert not torch.equal(first, one._draw_batch().chunks[0].features_nD[0])


def test_prepared_features_are_a_rotation_with_unit_variance(planted) -> None:
    features = planted[0][0]
    with ThreadPool(2) as pool:
        made = prepare_features(
            features * 7 + 3, scale=True, seed=1, dtype=torch.float32, device=CPU, pool=pool
        ).numpy()
    centred = features - features.mean(axis=0)
    np.testing.assert_allclose(made @ made.T, centred @ centred.T / centred.var(), atol=2e-3)
    assert abs(made.var() - 1.0) < 1e-4
    assert np.abs(np.corrcoef(made[:, 0], centred[:, 0])[0, 1]) < 0.9, "it must be rotated"
