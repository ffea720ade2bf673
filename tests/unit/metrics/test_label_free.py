from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score, silhouette_score

from icce_ray.errors import InputError, ResourceError
from icce_ray.metrics.label_free import generalization_score, silhouette, stability


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
    assert generalization_score(features_ND, labels_N, random_state=0) > 0.98
    with pytest.raises(InputError, match="two clusters with 10 images"):
        generalization_score(features_ND[:20], np.arange(20) // 5)


def test_the_silhouette_in_feature_space_is_scikit_learns(blobs):
    features_ND, labels_N = blobs
    expected = silhouette_score(features_ND.astype(np.float32), labels_N)
    assert silhouette(features_ND, labels_N) == pytest.approx(expected, abs=1e-6)


def test_samples_are_drawn_by_the_seed(blobs):
    features_ND, labels_N = blobs
    one, other = (silhouette(features_ND, labels_N, random_state=3, max_images=90) for _ in range(2))
    assert one == other
    assert one != silhouette(features_ND, labels_N)


def test_without_umap_learn_the_message_names_the_extra(blobs, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ResourceError, match=r"icce_ray\[umap\]"):
        silhouette(*blobs, space="umap")


def test_umap_gets_the_published_settings(blobs, monkeypatch):
    class FakeUMAP:
        def __init__(self, **settings):
            assert settings == {"n_neighbors": 30, "n_components": 50, "min_dist": 0.0, "random_state": 4}

        def fit_transform(self, points):
            return points[:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=FakeUMAP))
    features_ND, labels_N = blobs
    found = silhouette(features_ND, labels_N, space="umap", random_state=4)
    assert found == pytest.approx(silhouette_score(features_ND[:, :2].astype(np.float32), labels_N), abs=1e-6)


def test_stability_is_the_nmi_of_two_clusterings():
    rng = np.random.default_rng(0)
    a_N, b_N = rng.integers(0, 4, 100), rng.integers(0, 3, 100)
    assert stability(a_N, a_N[::1] * 2) == pytest.approx(1.0)
    assert stability(a_N, b_N) == pytest.approx(normalized_mutual_info_score(a_N, b_N, average_method="geometric"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"space": "pca"}), "'pca'"),
        (({"labels_N": np.zeros(180, dtype=int)}), "1 clusters of 180"),
        (({"labels_N": np.zeros(5, dtype=int)}), "must be"),
    ],
)
def test_input_without_a_silhouette_is_refused(blobs, arguments, message):
    features_ND, labels_N = blobs
    with pytest.raises(InputError, match=message):
        silhouette(**({"features_ND": features_ND, "labels_N": labels_N} | arguments))
