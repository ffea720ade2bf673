from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from icce_ray.metrics.label_free_scores import generalization_score, project_pca, project_umap, silhouette


@pytest.fixture(scope="module")
def blobs():
    rng = np.random.default_rng(0)
    labels_N = np.repeat(np.arange(3), 60)
    return (rng.normal(size=(3, 5)) * 6)[labels_N] + rng.normal(size=(180, 5)), labels_N


def test_real_clusters_generalise_and_shuffled_ones_do_not(blobs):
    features_ND, labels_N = blobs
    shuffled_N = np.random.default_rng(1).permutation(labels_N)
    assert generalization_score(features_ND, labels_N, random_state=0) > 0.98
    assert generalization_score(features_ND, shuffled_N, random_state=0) < 0.5


def test_clusters_smaller_than_the_folds_are_left_out(blobs):
    features_ND, labels_N = blobs
    labels_N = labels_N.copy()
    labels_N[:5] = 17
    expected = generalization_score(features_ND[5:], labels_N[5:], random_state=0)
    assert generalization_score(features_ND, labels_N, random_state=0) == expected
    assert generalization_score(features_ND[:20], np.arange(20) // 5, random_state=0) is None


def test_the_silhouette_is_scikit_learns(blobs):
    features_ND, labels_N = blobs
    expected = silhouette_score(features_ND.astype(np.float32), labels_N)
    assert silhouette(features_ND, labels_N) == pytest.approx(expected, abs=1e-6)


def test_one_cluster_and_clusters_of_one_image_have_no_silhouette(blobs):
    features_ND, _ = blobs
    assert silhouette(features_ND, np.zeros(180, dtype=int)) is None
    assert silhouette(features_ND, np.arange(180)) is None


def test_projections_have_at_most_fifty_dimensions_and_pca_keeps_the_distances_of_few(blobs):
    points_nD = np.random.default_rng(0).normal(size=(80, 60)).astype(np.float32)
    assert project_pca(points_nD, 0).shape == (80, 50)
    assert project_pca(points_nD[:20], 0).shape == (20, 20)
    features_ND, _ = blobs
    projected = project_pca(features_ND.astype(np.float32), 0)
    expected = np.linalg.norm(features_ND[:90] - features_ND[90:], axis=1)
    np.testing.assert_allclose(np.linalg.norm(projected[:90] - projected[90:], axis=1), expected, rtol=1e-5)


@pytest.mark.parametrize(("num_images", "neighbors", "dims"), [(180, 30, 50), (25, 24, 23)])
def test_umap_gets_the_published_settings_capped_for_small_samples(monkeypatch, num_images, neighbors, dims):
    class FakeUMAP:
        def __init__(self, **settings):
            self.settings = settings

        def fit_transform(self, points):
            return self.settings, points

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=FakeUMAP))
    points_nD = np.zeros((num_images, 60), dtype=np.float32)
    settings, points = project_umap(points_nD, 4)
    assert settings == {"n_neighbors": neighbors, "n_components": dims, "min_dist": 0.0, "random_state": 4, "n_jobs": 1}
    assert points is points_nD


def test_images_without_a_cluster_lower_both_scores(blobs):
    features_ND, labels_N = blobs
    noisy_N = labels_N.copy()
    noisy_N[::4] = -1
    rest = noisy_N >= 0
    assert silhouette(features_ND, noisy_N) == pytest.approx(0.75 * silhouette(features_ND[rest], labels_N[rest]))
    expected = 0.75 * generalization_score(features_ND[rest], labels_N[rest], random_state=0)
    assert generalization_score(features_ND, noisy_N, random_state=0) == pytest.approx(expected)
    assert silhouette(features_ND, np.full(180, -1)) is None
