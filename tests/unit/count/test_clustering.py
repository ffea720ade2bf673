"""The clusterings of parts of a sample, and their measures."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from icce_ray.config import ClusterCountConfig
from icce_ray.count.clustering import (
    count_clusters,
    measure_part,
    numbers_to_try,
    weigh_edges,
)
from icce_ray.errors import InputError
from icce_ray.runtime.progress import Progress


def gaussians(sizes: list[int], seed: int = 0, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """(features of 16 dimensions, labels). `spread`: deviation of the centres; that of the images about them is 1."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    centres = generator.normal(size=(len(sizes), 16)) * spread
    return (centres[labels] + generator.normal(size=(len(labels), 16))).astype(np.float32), labels


def test_the_numbers_fit_the_images_or_are_refused() -> None:
    default, given = ClusterCountConfig(), ClusterCountConfig(min_clusters=5, max_clusters=40)
    assert numbers_to_try(default, 10_000) == list(range(2, 101))
    assert numbers_to_try(default, 300) == list(range(2, 31))
    assert numbers_to_try(default, 12) == [2]
    assert numbers_to_try(given, 45) == list(range(5, 41))
    with pytest.raises(InputError, match=r"cluster_count\.max_clusters: 40 clusters, but 39 images are clustered at a"):
        numbers_to_try(given, 43)
    with pytest.raises(InputError, match=r"cluster_count\.min_clusters: 5 clusters, but 4 images are clustered at a"):
        numbers_to_try(ClusterCountConfig(min_clusters=5), 4)
    many = numbers_to_try(ClusterCountConfig(min_clusters=3, max_clusters=1000), 10_000)
    assert (many[0], many[-1]) == (3, 1000)
    assert len(many) <= 100
    assert all(upper <= 1.0605 * lower + 1 for lower, upper in pairwise(many))


def test_a_part_of_a_bounded_sample_is_measured_with_all_numbers() -> None:
    features, _ = gaussians([90, 60, 50])
    asked = ClusterCountConfig(max_images=150)
    made = measure_part(features, asked, [2, 3, 4], True, 0, 0)
    assert made.gaps_C.argmax() == made.silhouettes_C.argmax() == 1
    again, other, whole = (
        measure_part(features, asked, [2, 3, 4], True, 0, part)
        for part, asked in ((0, asked), (1, asked), (0, ClusterCountConfig()))
    )
    for first, second in zip(made, again, strict=True):
        np.testing.assert_array_equal(first, second)
    for left_out in made.labels_Cn:
        assert (left_out < 0).sum() == 15
    assert [row.max() for row in made.labels_Cn] == [1, 2, 3]
    assert not np.array_equal(made.silhouettes_C, other.silhouettes_C)
    assert not np.array_equal(made.silhouettes_C, whole.silhouettes_C)
    # More clusters than eigenvalues after them, or as many as images, have no measure.
    ends = measure_part(features[::20], ClusterCountConfig(min_clusters=8, max_clusters=9), [8, 9], True, 0, 0)
    assert np.isnan(ends.gaps_C).tolist() == [False, True]
    assert np.isnan(ends.silhouettes_C).tolist() == [False, True]


def test_edges_of_equal_length_weigh_more_where_images_are_sparse() -> None:
    # Ten images a step of 1 apart, then ten a step of 10 apart.
    line = np.concatenate([np.arange(10.0), 9.0 + 10.0 * np.arange(1, 11)])[:, None].astype(np.float32)
    weights = weigh_edges(line).toarray()
    np.testing.assert_array_equal(weights, weights.T)
    assert (weights.diagonal() == 0).all()
    tenth = np.sort(np.abs(line - line[:, 0]), axis=1)[:, 10]
    for one, other, length in ((4, 5, 1.0), (12, 13, 10.0)):
        expected = 2 * np.exp(-2 * length**2 / (tenth[one] * tenth[other]))
        assert weights[one, other] == pytest.approx(expected, rel=1e-5)


def test_copies_of_one_image_are_no_error() -> None:
    choice = count_clusters(
        np.ones((40, 4), np.float32), ClusterCountConfig(), center=True, seed=0, progress=Progress("count", quiet=True)
    )
    assert 2 <= choice.num_clusters <= 4


@pytest.mark.parametrize("sizes", [[60] * 5, [200, 60, 30, 20, 15], [150, 150, 20, 20, 20, 20]])
def test_equal_and_unequal_groups_are_counted(sizes: list[int]) -> None:
    features, _ = gaussians(sizes, seed=1)
    asked = ClusterCountConfig(num_seeds=3, max_clusters=12)
    choice = count_clusters(features, asked, center=True, seed=0, progress=Progress("count", quiet=True))
    assert choice.num_clusters == len(sizes)
    assert choice.low <= len(sizes) <= choice.high


def test_overlapping_groups_of_a_dozen_are_counted_beside_large_ones() -> None:
    features, _ = gaussians([200, 200, 12, 12], seed=2, spread=1.1)
    asked = ClusterCountConfig(num_seeds=3, max_clusters=10)
    choice = count_clusters(features, asked, center=True, seed=0, progress=Progress("count", quiet=True))
    assert (choice.low, choice.num_clusters, choice.high) == (2, 4, 4)


def test_no_clusters_of_a_single_gaussian_recur() -> None:
    features, _ = gaussians([300])
    asked = ClusterCountConfig(num_seeds=3, min_clusters=3, max_clusters=12)
    choice = count_clusters(features, asked, center=True, seed=0, progress=Progress("count", quiet=True))
    assert max(point.recurring.mean() for point in choice.curve) < 0.5
