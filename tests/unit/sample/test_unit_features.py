from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from icce_ray.errors import InputError
from icce_ray.sample import unit_features
from icce_ray.sample.unit_features import prepare

from .. import features as reference


@pytest.mark.parametrize("center", [True, False])
def test_prepared_features_have_length_one_and_equal_the_plain_computation(center: bool) -> None:
    features = reference.awkward_features(200, 12)
    prepared = prepare(features, center)[:]
    assert prepared.dtype == np.float32
    np.testing.assert_allclose(prepared, reference.normalised(features, center), atol=1e-6)


def test_preparing_does_not_touch_its_input_and_accepts_float16_read_only_maps(tmp_path: Path) -> None:
    features = reference.awkward_features(100, 6).astype(np.float16)
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    prepared = prepare(mapped, center=True)[:]
    assert np.array_equal(mapped, features)
    np.testing.assert_allclose(prepared, reference.normalised(features, True), atol=1e-6)


@pytest.mark.parametrize("dim", [1, 7, 300])
@pytest.mark.parametrize("center", [True, False])
def test_a_row_has_the_same_bits_whichever_rows_it_is_prepared_with(
    dim: int, center: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(reference.awkward_features(123, dim).astype(np.float16), center)
    whole = prepared[:]
    monkeypatch.setattr(unit_features, "ELEMENTS_PER_BLOCK", dim * 10)
    assert np.array_equal(prepared[:], whole)
    assert np.array_equal(prepared[np.array([77, 3, 3, 120])], whole[[77, 3, 3, 120]])
    assert np.array_equal(np.concatenate([prepared[i : i + 1] for i in range(123)]), whole)


def test_a_zero_vector_stays_zero() -> None:
    features = np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 0.5]], np.float32)
    assert prepare(features, center=False)[:][0].tolist() == [0.0, 0.0]


def test_images_that_equal_the_mean_get_no_invented_direction() -> None:
    features = np.full((50, 3), 0.1)
    assert (features.sum(axis=0) / 50 != 0.1).all(), "the mean has a rounding error"
    assert not prepare(features, center=True)[:].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_with_their_row(value: float) -> None:
    features = np.ones((10, 3), np.float32)
    features[7, 1] = value
    with pytest.raises(InputError, match="row 7 is not finite"):
        prepare(features, center=True)


@pytest.mark.parametrize("shape", [(1, 3), (5, 0), (5,)])
def test_features_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="shape"):
        prepare(np.ones(shape, np.float32), center=True)
