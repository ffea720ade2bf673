"""The trained runs against the paper's formulas, and whatever may not change a result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from icce_ray.config import TurtleConfig
from icce_ray.methods.turtle import bilevel_step
from icce_ray.methods.turtle.feature_scaling import label_rows, prepare_features
from icce_ray.methods.turtle.run_block import RunBlock, run_blocks
from icce_ray.metrics.true_label_scores import clustering_accuracy
from icce_ray.runtime.threads import ThreadPool

from .transcription import plain_losses

CPU = torch.device("cpu")


def settings_of(**changes: Any) -> TurtleConfig:
    return TurtleConfig.model_validate({"num_steps": 50, "precision": "float32", "learning_rate": 0.02} | changes)


def make_block(sets: list[np.ndarray], settings: TurtleConfig, pool: ThreadPool, **changes: Any) -> RunBlock:
    dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    spaces = [
        prepare_features(features, scale=settings.scale_features, seed=0, dtype=dtype, device=CPU, pool=pool)
        for features in sets
    ]
    return RunBlock(spaces, settings, pool=pool, **{"runs": [0], "num_clusters": 4, "seed": 0} | changes)


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
    monkeypatch.setattr(bilevel_step, "CHUNK_ROWS", 70)
    settings = settings_of(warm_start=warm_start, **changes)
    with ThreadPool(2) as pool:
        block, other = (make_block(planted[0][:num_spaces], settings, pool, runs=[0, 1]) for _ in range(2))

        def at(step: int) -> RunBlock:
            other.step = step
            return other

        def batch(step: int) -> list[torch.Tensor]:
            chunks = at(step).batch().chunks
            return [torch.cat(parts) for parts in zip(*(chunk.features_nD for chunk in chunks), strict=True)]

        expected = []
        for run in range(2):
            columns = slice(4 * run, 4 * run + 4)
            losses = plain_losses(
                [layer[:, columns] for layer in other.encoder.layers],
                lambda step, columns=columns: [
                    parameters.tensors[0][:, columns] for parameters in at(step).new_inner()
                ],
                batch,
                num_steps=50,
                inner_steps=settings.inner_steps,
                learning_rate=settings.learning_rate,
                inner_rates=[settings.inner_rate(space.features_ND.shape[1]) for space in block.spaces],
                entropy_weight=settings.entropy_weight,
                warm_start=warm_start,
            )
            expected.append(losses)
        losses = [block.train_step() for _ in range(50)]
    found = [torch.stack([loss.prediction_error, loss.entropy], dim=1).numpy() for loss in losses]
    assert abs(expected[0][0][0] - expected[0][-1][0]) > 0.05, "the labels must have moved"
    assert abs(expected[0][-1][0] - expected[1][-1][0]) > 1e-3, "the runs must differ"
    np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_planted_clusters_are_found_in_any_unit(planted, precision: str) -> None:
    (features, *_), labels = planted
    for unit, offset in ((1.0, 0.0), (100.0, 500.0)):
        with ThreadPool(1) as pool:
            given = [(features * unit + offset).astype(np.float32)]
            block = make_block(given, settings_of(num_steps=100, precision=precision), pool)
            for _ in range(100):
                block.train_step()
            (found,) = label_rows(given, block.layers_on_given(), 4, device=CPU, pool=pool)
            assert clustering_accuracy(labels, found) > 0.97


def test_the_number_of_threads_does_not_change_a_bit(planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bilevel_step, "CHUNK_ROWS", 37)
    found = []
    for num_threads in (1, 2, 3):
        with ThreadPool(num_threads) as pool:
            block = make_block(planted[0], settings_of(precision="bfloat16"), pool, runs=[0, 1])
            losses = [block.train_step().prediction_error.tolist() for _ in range(8)]
            labels_RN = label_rows(planted[0], block.layers_on_given(), 4, device=CPU, pool=pool)
            found.append((losses, block.tensors(), labels_RN))
    for losses, tensors, labels_RN in found[1:]:
        assert losses == found[0][0]
        assert np.array_equal(labels_RN, found[0][2])
        assert all(torch.equal(tensor, found[0][1][name]) for name, tensor in tensors.items())


def test_a_run_is_the_same_in_any_block(planted) -> None:
    """To rounding: blocks of other sizes are other products. Which runs share a block never depends on the workers."""
    found = []
    with ThreadPool(1) as pool:
        for runs in ([2], [1, 2]):
            block = make_block(planted[0][:1], settings_of(batch_size=100), pool, runs=runs)
            found.append([block.train_step().prediction_error[-1].item() for _ in range(5)])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_every_run_is_in_one_block_of_few_columns() -> None:
    for num_runs, num_clusters, sizes in ((5, 10, [2, 3]), (5, 100, [1] * 5), (1, 2, [1]), (7, 4, [2, 2, 3])):
        blocks = run_blocks(num_runs, num_clusters)
        assert [run for block in blocks for run in block] == list(range(num_runs))
        assert list(map(len, blocks)) == sizes


def test_batches_differ_by_step(planted) -> None:
    with ThreadPool(1) as pool:
        block = make_block(planted[0][:1], settings_of(batch_size=50), pool)
        first = block.batch().chunks[0].features_nD[0]
        assert first.shape == (50, 24)
        block.step = 1
        assert not torch.equal(first, block.batch().chunks[0].features_nD[0])


def test_prepared_features_are_a_rotation_with_unit_variance(planted) -> None:
    features = planted[0][0]
    with ThreadPool(2) as pool:
        space = prepare_features(features * 7 + 3, scale=True, seed=1, dtype=torch.float32, device=CPU, pool=pool)
    made = space.features_ND.numpy()
    centred = features - features.mean(axis=0)
    np.testing.assert_allclose(made @ made.T, centred @ centred.T / centred.var(), atol=2e-3)
    assert abs(made.var() - 1.0) < 1e-4
    assert np.abs(np.corrcoef(made[:, 0], centred[:, 0])[0, 1]) < 0.9, "it must be rotated"
    layer = torch.randn(25, 3)
    given = space.layer_on_given(layer)
    on_given = torch.from_numpy(features * 7 + 3) @ given[:-1] + given[-1]
    np.testing.assert_allclose(on_given, space.features_ND @ layer[:-1] + layer[-1], atol=1e-3)
