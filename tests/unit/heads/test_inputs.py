from __future__ import annotations

import numpy as np
import pytest
import torch

from icce_ray.heads.communicator import SingleWorker
from icce_ray.heads.inputs import InputNorm, random_rotation

CPU = torch.device("cpu")


def features(scale: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(0)
    return ((generator.normal(size=(300, 6)) * np.array([1, 2, 3, 1, 0.1, 5]) + 4) * scale).astype(np.float32)


def test_training_batches_are_normalised_as_batchnorm_does() -> None:
    x = features()
    norm = InputNorm(x, "batch_norm", rotate=False, seed=0, device=CPU)
    batch = norm.gather(np.arange(100))
    expected = torch.nn.BatchNorm1d(6, affine=False, eps=norm.min_variance)(torch.from_numpy(x[:100]))
    torch.testing.assert_close(norm.normalise_batch(batch, 100, SingleWorker()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["batch_norm", "standardize"])
def test_labelling_uses_the_statistics_of_the_whole_set(kind: str) -> None:
    x = features()
    norm = InputNorm(x, kind, rotate=False, seed=0, device=CPU)
    deviation = np.sqrt(x.var(axis=0) + norm.min_variance)
    expected = torch.from_numpy((x - x.mean(axis=0)) / deviation)
    torch.testing.assert_close(norm.normalise(norm.gather(np.arange(300))), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_of_the_features_does_not_matter(scale: float) -> None:
    rows = np.arange(300)
    small, large = (InputNorm(features(s), "batch_norm", True, 0, CPU) for s in (1.0, scale))
    a = small.normalise_batch(small.gather(rows), 300, SingleWorker())
    b = large.normalise_batch(large.gather(rows), 300, SingleWorker())
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_constant_dimensions_become_zero() -> None:
    x = features()
    x[:, 2] = 7.0
    norm = InputNorm(x, "batch_norm", rotate=False, seed=0, device=CPU)
    batch = norm.normalise_batch(norm.gather(np.arange(300)), 300, SingleWorker())
    assert torch.isfinite(batch).all()
    assert (batch[:, 2].abs() < 1e-2).all()


def test_the_rotation_is_orthogonal_and_seeded() -> None:
    rotation = random_rotation(40, seed=2)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(40), rtol=0, atol=1e-5)
    assert torch.equal(rotation, random_rotation(40, seed=2))
    assert not torch.equal(rotation, random_rotation(40, seed=3))


def test_none_leaves_features_as_they_are() -> None:
    x = features()
    norm = InputNorm(x, "none", rotate=False, seed=0, device=CPU)
    assert np.array_equal(norm.normalise(norm.gather(np.array([3, 1]))).numpy(), x[[3, 1]])
