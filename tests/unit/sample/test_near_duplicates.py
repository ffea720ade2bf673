from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from icce_ray.config import SampleConfig
from icce_ray.sample import near_duplicates
from icce_ray.sample.near_duplicates import (
    DuplicatePairs,
    ProjectedRows,
    auto_threshold,
    find_near_duplicates,
    find_pairs,
    from_bytes,
    group,
    group_table,
    pair_table,
    plan_search,
    project_rows,
    sort_rows,
    to_bytes,
)
from icce_ray.sample.unit_features import RESOLUTION, prepare

from ..features import awkward_features, similarity_units

THRESHOLD = 0.97


def brute_force(features: npt.NDArray[np.floating], threshold: float) -> npt.NDArray[np.int64]:
    """The near-duplicates (higher, lower) of every pair of rows, zero vectors included where they are identical."""
    units = similarity_units(prepare(features, center=True)[:])
    is_near = units >= round(threshold / RESOLUTION)
    return np.argwhere(np.tril(is_near, -1))


def leaders_of(pairs: npt.NDArray[np.int64], num_images: int) -> list[int]:
    """Image by image: the lowest leader that it is a near-duplicate of, or itself."""
    leader = list(range(num_images))
    for image in range(num_images):
        near = sorted(lower for higher, lower in pairs if higher == image and leader[lower] == lower)
        leader[image] = near[0] if near else image
    return leader


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROWS_PER_PART": 60, "QUERY_BLOCK": 17, "BASE_BLOCK": 23, "NUM_DIRECTIONS": 4}.items():
        monkeypatch.setattr(near_duplicates, name, value)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("threshold", [0.3, THRESHOLD, 0.9999, 1.0])
@pytest.mark.parametrize("dim", [3, 12])
def test_the_pairs_are_those_of_brute_force(threshold: float, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MAX_DUPLICATES_PER_IMAGE", 10**6)
    features = np.unique(awkward_features(300, dim), axis=0)  # no identical rows
    features = features[np.random.default_rng(0).permutation(len(features))]
    features[11] = features[250] * (1 + 1e-5 * np.arange(dim))
    found = find_near_duplicates(features, threshold)
    expected = brute_force(features, threshold)
    assert [250, 11] in expected.tolist()
    assert np.column_stack([found.pairs.higher_P, found.pairs.lower_P]).tolist() == expected.tolist()
    units = similarity_units(prepare(features, center=True)[:])
    assert np.array_equal(found.pairs.units_P, units[found.pairs.higher_P, found.pairs.lower_P])


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("threshold", [THRESHOLD, 0.9999])
def test_leaders_are_those_of_brute_force_with_copies_and_near_copies(threshold: float) -> None:
    features = awkward_features(300, 5)
    # The three rows that are zero are copies of each other too, though a cosine does not show it.
    pairs = [*brute_force(features, threshold).tolist(), *([high, low] for high in range(300) for low in range(high)
             if np.array_equal(features[high], features[low]))]  # fmt: skip
    expected = leaders_of(np.array(pairs), 300)
    found = find_near_duplicates(features, threshold)
    assert 30 < len(found.followers) < 270
    assert found.leader_N.tolist() == expected
    assert np.array_equal(found.leaders, np.unique(expected))
    assert sorted([*found.leaders, *found.followers]) == list(range(300))


def test_groups_do_not_chain_images_that_differ() -> None:
    # Steps of 4 degrees along an arc: each is near the next, the ends are not near each other.
    angle = np.radians(np.arange(0, 40, 4))
    arc = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    scattered = np.radians(np.linspace(60, 330, 30))
    others = np.stack([np.cos(scattered), np.sin(scattered)], axis=1)
    features = np.vstack([arc, others])
    features = np.vstack([features, -features])  # the mean is 0
    found = find_near_duplicates(features, float(np.cos(np.radians(6))))
    assert found.leader_N[:10].tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]


@pytest.mark.usefixtures("_small_blocks")
def test_any_parts_in_any_order_give_the_same_duplicates() -> None:
    features = awkward_features(300, 5)
    whole = find_near_duplicates(features, THRESHOLD)
    plan = plan_search(features, THRESHOLD)
    pieces = [project_rows(features, plan, start, stop) for start, stop in ((0, 70), (70, 71), (71, 300))]
    projected = sort_rows(plan, *(np.concatenate(column) for column in zip(*pieces, strict=True)))
    assert len(projected.parts) > 3
    again = from_bytes(ProjectedRows, to_bytes(projected))
    found = [find_pairs(features, again, start, stop) for start, stop in reversed(projected.parts)]
    divided = group(again, [from_bytes(DuplicatePairs, to_bytes(pairs)) for pairs in found])
    assert np.array_equal(divided.leader_N, whole.leader_N)
    assert divided.threshold == whole.threshold
    for name in ("higher_P", "lower_P", "units_P"):
        assert np.array_equal(getattr(divided.pairs, name), getattr(whole.pairs, name))


def test_of_an_image_with_many_near_duplicates_the_lowest_are_listed() -> None:
    features = np.random.default_rng(0).standard_normal((200, 20))
    features[100:] = features[0] + 0.001 * features[100:]
    pairs = find_near_duplicates(features, THRESHOLD).pairs
    assert pairs.lower_P[pairs.higher_P == 199].tolist() == [0, *range(100, 131)]


def test_the_automatic_threshold_lies_far_above_neighbours_and_means_copies_if_all_are_alike() -> None:
    rng = np.random.default_rng(0)
    spread = prepare(rng.standard_normal((400, 8)), center=True)
    cosine = spread[:] @ spread[:].T
    np.fill_diagonal(cosine, -2)
    distance = 1 - np.median(np.sort(cosine, axis=1)[:, -20])
    assert 1 - auto_threshold(spread) == pytest.approx(0.01 * distance, rel=0.05)
    alike = rng.standard_normal((400, 8)) * 1e-4 + np.repeat(np.eye(8)[:2], 200, axis=0)
    assert auto_threshold(prepare(alike, center=True)) == 1.0


def test_planted_copies_and_near_copies_are_left_out_by_the_automatic_threshold() -> None:
    rng = np.random.default_rng(0)
    originals = rng.standard_normal((300, 32)).astype(np.float16)
    copied = np.repeat([5, 80, 211], 12)
    near = originals[copied] + rng.normal(0, 0.01, (36, 32)).astype(np.float16)
    found = find_near_duplicates(np.concatenate([originals, originals[copied], near]), "auto")
    assert np.array_equal(found.leaders, np.arange(300))
    assert np.array_equal(found.leader_N[300:], np.concatenate([copied, copied]))


@pytest.mark.parametrize("features", [np.tile([[1.0, 2.0, 3.0]], (60, 1)), np.repeat(np.eye(4), 25, axis=0)])
def test_a_collection_without_variety_keeps_all_its_images(features: npt.NDArray[np.float64]) -> None:
    found = find_near_duplicates(features, "auto")
    assert len(found.leaders) == len(features)
    assert len(found.pairs) >= 50


def test_tables_name_images_by_their_ids() -> None:
    pairs = DuplicatePairs(np.array([2, 3]), np.array([0, 2]), np.array([1 / RESOLUTION, 0.5 / RESOLUTION], np.int64))
    image_ids = np.array([10, 11, 13, 17])
    assert pair_table(pairs, image_ids).to_pylist() == [
        {"image_id": 13, "duplicate_of": 10, "similarity": 1.0},
        {"image_id": 17, "duplicate_of": 13, "similarity": 0.5},
    ]
    assert group_table(np.array([0, 1, 0, 3]), image_ids).to_pylist() == [
        {"image_id": 10, "leader": 10},
        {"image_id": 13, "leader": 10},
    ]
    assert group_table(np.arange(4), image_ids).num_rows == 0


def test_a_threshold_that_is_no_cosine_is_refused() -> None:
    with pytest.raises(ValueError, match="up to 1"):
        SampleConfig(duplicate_threshold=1.5)
