from __future__ import annotations

import numpy as np
import pytest

from icce_ray.errors import InputError
from icce_ray.neighbors import search
from icce_ray.neighbors.search import exact_similarity, most_similar, pairs_above, prepare

from . import reference


@pytest.mark.parametrize("center", [True, False])
def test_prepared_features_have_length_one_and_equal_the_plain_computation(center: bool) -> None:
    features = reference.awkward_features(200, 12)
    prepared = prepare(features, center)
    assert prepared.dtype == np.float32
    np.testing.assert_allclose(prepared, reference.normalised(features, center), atol=1e-6)


def test_preparing_does_not_touch_its_input_and_accepts_float16_read_only_maps(tmp_path) -> None:
    features = reference.awkward_features(100, 6).astype(np.float16)
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    prepared = prepare(mapped, center=True)
    assert np.array_equal(mapped, features)
    np.testing.assert_allclose(prepared, reference.normalised(features, True), atol=1e-6)


def test_blocks_do_not_change_prepared_features(monkeypatch: pytest.MonkeyPatch) -> None:
    features = reference.awkward_features(123, 7)
    whole = prepare(features, center=True)
    monkeypatch.setattr(search, "PREPARED_ELEMENTS", 7 * 10)
    np.testing.assert_allclose(prepare(features, center=True), whole, atol=1e-7)


def test_a_zero_vector_stays_zero() -> None:
    features = np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 0.5]], np.float32)
    assert prepare(features, center=False)[0].tolist() == [0.0, 0.0]


def test_images_that_equal_the_mean_get_no_invented_direction() -> None:
    features = np.full((50, 3), 0.1, np.float32)
    assert not prepare(features, center=True).any()


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


@pytest.mark.parametrize("threshold", [-1.0, -0.2, 0.0, 0.35, 0.8, 1.0])
@pytest.mark.parametrize("center", [True, False])
def test_pairs_above_a_threshold_are_those_of_brute_force(
    threshold: float, center: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "BASE_BLOCK", 64)
    base = prepare(reference.awkward_features(301, 5), center)
    units = reference.similarity_units(base)
    found: dict[int, list[int]] = {image: [] for image in range(100, 177)}
    for rows, columns in pairs_above(base, 100, 177, threshold):
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            found[row].append(column)
    assert {image: sorted(hits) for image, hits in found.items()} == {
        image: reference.above(units, image, threshold) for image in found
    }


@pytest.mark.parametrize("k", [1, 7, 40, 299, 1000])
@pytest.mark.parametrize("center", [True, False])
def test_the_most_similar_are_those_of_brute_force_with_ties_to_the_lower_id(
    k: int, center: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "QUERY_BLOCK", 50)
    monkeypatch.setattr(search, "BASE_BLOCK", 70)
    monkeypatch.setattr(search, "TIED_QUERY_BLOCK", 8)
    monkeypatch.setattr(search, "TIE_SLACK", 3)
    base = prepare(reference.awkward_features(300, 5), center)
    units = reference.similarity_units(base)
    similarities, ids = most_similar(base, np.arange(300), k)
    assert ids.shape == (300, min(k, 299))
    for image in range(300):
        assert sorted(ids[image].tolist()) == sorted(reference.nearest(units, image, k))
    np.testing.assert_allclose(similarities, np.take_along_axis(base @ base.T, ids, axis=1), atol=1e-6)
    assert (np.diff(similarities, axis=1) <= 1e-6).all()


def test_ties_beyond_the_candidate_list_go_to_the_lower_id() -> None:
    base = prepare(np.repeat(np.eye(3, dtype=np.float32), 200, axis=0), center=False)
    _, ids = most_similar(base, np.array([0, 150, 599]), 10)
    assert sorted(ids[0].tolist()) == list(range(1, 11))
    assert sorted(ids[1].tolist()) == list(range(10))
    assert sorted(ids[2].tolist()) == list(range(400, 410))


def test_a_zero_query_gets_the_lowest_ids() -> None:
    base = prepare(np.vstack([np.zeros((2, 4)), np.random.default_rng(0).standard_normal((30, 4))]), center=False)
    similarities, ids = most_similar(base, np.array([1]), 3)
    assert ids.tolist() == [[0, 2, 3]]
    assert similarities.tolist() == [[0.0, 0.0, 0.0]]


def test_exact_similarities_do_not_depend_on_how_pairs_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    base = prepare(reference.awkward_features(60, 9), center=True)
    rows, columns = np.divmod(np.arange(3600), 60)
    units = exact_similarity(base, rows, columns)
    monkeypatch.setattr(search, "RESCORED_ELEMENTS", 9 * 7)
    assert np.array_equal(exact_similarity(base, rows, columns), units)
    assert np.array_equal(units.reshape(60, 60), reference.similarity_units(base))
