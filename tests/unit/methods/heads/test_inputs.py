from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.inputs import FeatureNorm, HeadInputs, batch_normalise, random_rotation, seen_columns
from icce_ray.runtime.threads import ThreadPool

CPU = torch.device("cpu")


def features(scale: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(0)
    return ((generator.normal(size=(300, 6)) * np.array([1, 2, 3, 1, 0.1, 5]) + 4) * scale).astype(np.float32)


def make_norm(x: np.ndarray, kind: Literal["batch_norm", "standardize", "none"], rotate: bool = False) -> FeatureNorm:
    return FeatureNorm(x, kind, rotate, seed=0, device=CPU, pool=ThreadPool(0))


def test_training_batches_are_normalised_as_batchnorm_does() -> None:
    x = features()
    norm = make_norm(x, "batch_norm")
    batch = norm.gather(np.arange(100))
    expected = torch.nn.BatchNorm1d(6, affine=False, eps=norm.min_variance)(torch.from_numpy(x[:100]))
    torch.testing.assert_close(batch_normalise(batch, norm.min_variance), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(norm.normalise_batch(batch), batch_normalise(batch, norm.min_variance))
    standardised = make_norm(x, "standardize")
    assert torch.equal(standardised.normalise_batch(batch), standardised.normalise(batch))


@pytest.mark.parametrize("kind", ["batch_norm", "standardize"])
def test_labelling_uses_the_statistics_of_the_whole_set(kind: Literal["batch_norm", "standardize"]) -> None:
    x = features()
    norm = make_norm(x, kind)
    deviation = np.sqrt(x.var(axis=0) + norm.min_variance)
    expected = torch.from_numpy((x - x.mean(axis=0)) / deviation)
    torch.testing.assert_close(norm.normalise(norm.gather(np.arange(300))), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_of_the_features_does_not_matter(scale: float) -> None:
    rows = np.arange(300)
    small, large = (make_norm(features(s), "batch_norm", rotate=True) for s in (1.0, scale))
    a = small.normalise_batch(small.gather(rows))
    b = large.normalise_batch(large.gather(rows))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_constant_dimensions_become_zero() -> None:
    x = features()
    x[:, 2] = 7.0
    norm = make_norm(x, "batch_norm")
    batch = norm.normalise_batch(norm.gather(np.arange(300)))
    assert torch.isfinite(batch).all()
    assert (batch[:, 2].abs() < 1e-2).all()


def test_the_rotation_is_orthogonal_and_seeded() -> None:
    rotation = random_rotation(40, seed=2)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(40), rtol=0, atol=1e-5)
    assert torch.equal(rotation, random_rotation(40, seed=2))
    assert not torch.equal(rotation, random_rotation(40, seed=3))


def test_none_leaves_features_as_they_are() -> None:
    x = features()
    norm = make_norm(x, "none")
    assert np.array_equal(norm.normalise(norm.gather(np.array([3, 1]))).numpy(), x[[3, 1]])


def test_each_head_sees_a_random_share_of_its_own_whichever_worker_trains_it() -> None:
    columns = seen_columns(range(40), 128, 64, seed=3)
    assert columns is not None
    assert columns.shape == (40, 64)
    assert (columns.diff(dim=1) > 0).all()
    some = seen_columns(range(5, 7), 128, 64, seed=3)
    assert some is not None
    assert torch.equal(some, columns[5:7])
    assert not torch.equal(columns[0], columns[1])
    # Every dimension is seen by about half of the heads.
    seen = torch.bincount(columns.flatten(), minlength=128)
    assert seen.min() > 8
    assert seen.max() < 32


@pytest.mark.parametrize(
    ("dim", "share", "expected"), [(30, 0.1, None), (40, 0.5, 32), (200, 0.5, 100), (200, 1.0, None)]
)
def test_heads_see_all_of_few_dimensions(dim: int, share: float, expected: int | None) -> None:
    columns = seen_columns(range(3), dim, HeadsConfig(input_share=share).num_inputs(dim), seed=0)
    assert (None if columns is None else columns.shape[1]) == expected


def test_inputs_are_the_columns_that_a_head_sees() -> None:
    batch, columns = torch.randn(7, 40), seen_columns(range(3), 40, 32, seed=0)
    assert columns is not None
    inputs = HeadInputs(batch, columns)
    together = inputs.of(slice(0, 3))
    for head in range(3):
        assert torch.equal(together[head], batch[:, columns[head]])
        assert torch.equal(inputs.of(slice(head, head + 1), 4), batch[:4, columns[head]])
    assert torch.equal(HeadInputs(batch, None).of(slice(0, 3), 4), batch[:4])
