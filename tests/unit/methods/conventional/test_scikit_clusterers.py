from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.cluster import HDBSCAN, AffinityPropagation, AgglomerativeClustering, SpectralClustering
from sklearn.mixture import GaussianMixture

from icce_ray.config import ConventionalConfig, build_config
from icce_ray.errors import InputError, ResourceError
from icce_ray.methods.conventional import scikit_clusterers
from icce_ray.methods.conventional.scikit_clusterers import CLUSTERERS, fit, represent
from icce_ray.methods.stage import method_stage
from icce_ray.metrics.true_label_scores import clustering_accuracy

TRUE = np.arange(150) % 3
PREFERENCE, THRESHOLD = -20.0, 4.0
DIRECT = {
    "agglomerative": AgglomerativeClustering(3),
    "spectral": SpectralClustering(3, affinity="nearest_neighbors", n_neighbors=10, random_state=5),
    "affinity_propagation": AffinityPropagation(damping=0.9, max_iter=1000, preference=PREFERENCE, random_state=5),
    "hdbscan": HDBSCAN(min_cluster_size=8, copy=True),
    "gmm": GaussianMixture(3, covariance_type="full", random_state=5),
}
"""Scikit-learn's own calls."""


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, 6)) * 3
    return (centres[TRUE] + generator.normal(size=(150, 6))).astype(np.float32)


def settings(**changes: object) -> ConventionalConfig:
    return ConventionalConfig.model_validate({"preference": PREFERENCE, "min_cluster_size": 8, **changes})


@pytest.mark.parametrize("method", DIRECT)
def test_the_labels_are_those_of_scikit_learns_own_call(features: np.ndarray, method: str) -> None:
    asked = settings(representation="raw")
    number = None if method in ("affinity_propagation", "hdbscan") else 3
    found = fit(features, asked, method=method, num_clusters=number, seed=5)
    centred = features - features.mean(axis=0, dtype=np.float64)
    points = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(represent(features, asked, 0), points, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labels = DIRECT[method].fit_predict(represent(features, asked, 0))
    assert found.labels_HN.shape == (1, 150)
    assert found.labels_HN.dtype == np.int32
    np.testing.assert_array_equal(found.labels_HN[0], labels)
    clustered = labels >= 0
    assert clustering_accuracy(TRUE[clustered], labels[clustered]) > 0.95
    assert found.losses_H is None
    assert found.notes == {"num_clusters": 3, "num_noise": (~clustered).sum(), "converged": True}
    assert (method == "hdbscan") == (not clustered.all())


def test_the_number_is_found_by_the_distance_threshold(features: np.ndarray) -> None:
    asked = settings(distance_threshold=THRESHOLD, linkage="average", normalize=False)
    found = fit(features, asked, method="agglomerative", num_clusters=None, seed=0)
    direct = AgglomerativeClustering(None, distance_threshold=THRESHOLD, linkage="average")
    np.testing.assert_array_equal(found.labels_HN[0], direct.fit_predict(features))
    assert found.notes["num_clusters"] == direct.n_clusters_


def test_pca_clusters_at_most_fifty_dimensions(features: np.ndarray) -> None:
    wide = np.random.default_rng(1).normal(size=(150, 60))
    assert represent(wide, settings(representation="pca"), 0).shape == (150, 50)
    few, raw = (represent(features, settings(representation=name), 0) for name in ("pca", "raw"))
    np.testing.assert_allclose(few @ few.T, (raw - raw.mean(0)) @ (raw - raw.mean(0)).T, atol=1e-5)


def test_too_few_clusters_are_refused_with_the_setting_to_change(features: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"0 clusters among 150 images \(150 are noise\).*min_cluster_size"):
        fit(features, settings(min_cluster_size=100), method="hdbscan", num_clusters=None, seed=0)
    with pytest.raises(InputError, match=r"1 clusters .*distance_threshold"):
        fit(features, settings(distance_threshold=1e3), method="agglomerative", num_clusters=None, seed=0)


def test_what_scikit_learn_refuses_is_the_users_to_change(
    features: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("Fitting the mixture model failed")

    monkeypatch.setattr(GaussianMixture, "fit_predict", refuse)
    with pytest.raises(InputError, match="method gmm: Fitting the mixture model failed"):
        fit(features, settings(), method="gmm", num_clusters=3, seed=0)


@pytest.mark.parametrize("method", CLUSTERERS)
def test_memory_is_checked_before_the_work_with_numbers_and_a_remedy(
    features: np.ndarray, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scikit_clusterers, "represent", None)
    monkeypatch.setattr(scikit_clusterers, "available_memory_bytes", lambda: 1_000)
    with pytest.raises(ResourceError, match=rf"{method}: 150 images of 6 dimensions .* GB are free.*max_images"):
        fit(features, settings(), method=method, num_clusters=3, seed=0)


def test_methods_of_one_section_never_take_each_others_results() -> None:
    asked = {"embeddings": "x.npy", "output": "out", "conventional": {"representation": "raw"}}
    found = []
    for method in CLUSTERERS:
        number = "auto" if method in ("affinity_propagation", "hdbscan") else 3
        config = build_config(asked | {"method": method, "num_clusters": number}, "test")
        found.append(method_stage(method).settings(config))
        assert found[-1]["num_clusters"] == number
    assert all(one != other for row, one in enumerate(found) for other in found[:row])


def test_umap_is_asked_for_before_the_work_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"embeddings": "x.npy", "output": "out", "method": "gmm", "num_clusters": 3}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check = method_stage("gmm").check
    assert check is not None
    check(build_config(asked, "test"))
    with pytest.raises(ResourceError, match=r"umap needs the package umap-learn: pip install 'icce_ray\[umap\]'"):
        check(build_config(asked | {"conventional": {"representation": "umap"}}, "test"))


@pytest.mark.parametrize("num_images", [2, 3, 9])
@pytest.mark.parametrize("method", sorted(CLUSTERERS.keys() - {"hdbscan"}))
def test_few_images_have_clusters(features: np.ndarray, method: str, num_images: int) -> None:
    for number in {2, num_images}:
        asked = None if method == "affinity_propagation" else number
        found = fit(features[:num_images], settings(preference=None), method=method, num_clusters=asked, seed=0)
        assert found.labels_HN.shape == (1, num_images)
        assert found.notes["num_clusters"] == number or asked is None


@pytest.mark.parametrize("method", ["affinity_propagation", "gmm", "hdbscan"])
def test_images_that_are_all_alike_are_named(method: str) -> None:
    with pytest.raises(InputError, match=r"at least 2 are needed: (all have the same features)"):
        fit(np.ones((20, 3), np.float32), settings(), method=method, num_clusters=2, seed=0)
