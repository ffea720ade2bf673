"""One small clustering: its sample and its measures."""

from __future__ import annotations

import numpy as np
import pytest

from icce_ray.config import ClusterCountConfig, HeadsConfig, NeighborsConfig
from icce_ray.count.clustering import Clustering, cluster_range, compare, draw_sample, make_clustering
from icce_ray.errors import InputError


def gaussians(num_clusters: int, num_images: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping: (features of 32 dimensions, labels)."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(num_clusters, 32)) * spread
    labels = generator.integers(0, num_clusters, num_images)
    return (centres[labels] + generator.normal(size=(num_images, 32))).astype(np.float32), labels


def clustering(*heads: list[int], silhouette: float = 0.5) -> Clustering:
    return Clustering(np.array(heads, dtype=np.int32), 2, 0.9, silhouette)


def test_stability_is_between_the_heads_of_different_seeds_and_adjusted_for_chance() -> None:
    same = clustering([0, 0, 1, 1], [1, 1, 0, 0])
    across = clustering([0, 1, 0, 1], [0, 1, 0, 1])
    agreed = compare(2, [0, 1], [same, same])
    np.testing.assert_allclose(agreed.stability, 1.0)
    # The third seed's heads agree among themselves; that is not stability.
    divided = compare(2, [0, 1, 2], [same, same, across])
    np.testing.assert_allclose(divided.stability, [0.25, 0.25, -0.5])
    rng = np.random.default_rng(0)
    drawn = [clustering(rng.integers(0, 50, 2000).tolist()) for _ in range(2)]
    assert abs(compare(50, [0, 1], drawn).stability[0]) < 0.01, "chance alone is no stability, however many clusters"


def test_the_range_fits_the_images_or_is_refused() -> None:
    default, given = ClusterCountConfig(), ClusterCountConfig(min_clusters=5, max_clusters=40)
    assert cluster_range(default, 10_000) == (2, 100)
    assert cluster_range(default, 300) == (2, 30)
    assert cluster_range(default, 12) == (2, 2)
    assert cluster_range(given, 40) == (5, 40)
    with pytest.raises(InputError, match=r"cluster_count\.max_clusters: 40 clusters, but 39 images are looked at"):
        cluster_range(given, 39)
    with pytest.raises(InputError, match=r"cluster_count\.min_clusters: 5 clusters, but 4 images are looked at"):
        cluster_range(ClusterCountConfig(min_clusters=5), 4)


def test_the_sample_is_bounded_seeded_and_knows_no_number_of_clusters() -> None:
    features, _ = gaussians(4, 400, 1.0, 0)
    neighbors = NeighborsConfig(min_neighbors=10)
    sample = draw_sample(features, 150, neighbors, 0)
    assert sample.features_nD.shape == (150, 32)
    assert sample.points_md.shape == (150, 32)
    assert set(sample.graph.degrees) == {10}
    np.testing.assert_array_equal(draw_sample(features, 150, neighbors, 0).features_nD, sample.features_nD)
    other = draw_sample(features, 150, neighbors, 1)
    assert not np.array_equal(other.features_nD, sample.features_nD)


def test_a_clustering_is_the_same_on_any_number_of_threads() -> None:
    features, _ = gaussians(3, 200, 1.0, 0)
    sample = draw_sample(features, 1000, NeighborsConfig(), 0)
    heads = HeadsConfig(num_heads=2, num_epochs=3, hidden_dim=64, bottleneck_dim=32)
    one, two = (make_clustering(sample, 3, 5, heads, num_threads) for num_threads in (1, 2))
    np.testing.assert_array_equal(one.heads_Hn, two.heads_Hn)
    assert (one.silhouette, one.generalization) == (two.silhouette, two.generalization)
