from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from icce_ray.config import NeighborsConfig
from icce_ray.neighbors import faiss_engine as engine_module
from icce_ray.neighbors import ivf
from icce_ray.neighbors.graph import build
from icce_ray.neighbors.ivf import Cells, IvfEngine, choose_method, nearest_cells, plan_cells
from icce_ray.neighbors.rule import Rule
from icce_ray.neighbors.search import merge, most_similar, search
from icce_ray.neighbors.unit_features import Queries, prepare

from . import reference


def manifold(num_images: int, dim: int = 48, seed: int = 0) -> npt.NDArray[np.float32]:
    """Features of few intrinsic dimensions, as those of images are."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((60, 8))[rng.integers(0, 60, num_images)] + 0.5 * rng.standard_normal((num_images, 8))
    rows = np.tanh(latent @ rng.standard_normal((8, dim))) + 0.05 * rng.standard_normal((num_images, dim))
    return rows.astype(np.float32)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("threshold", [None, 0.6])
def test_what_lies_in_the_probed_cells_is_found_exactly_whatever_the_shards(
    threshold: float | None, num_shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "BASE_BLOCK", 64)
    monkeypatch.setattr(ivf, "BASE_BLOCK", 64)
    prepared = prepare(reference.awkward_features(250, 6), center=True)
    base = prepared[:]
    cells = Cells(base[[3, 50, 90, 130, 170, 210, 240]], num_probes=3, recall=0.0, operations_share=0.0)
    queries = Queries.of(prepared, np.arange(250))
    shards = np.array_split(np.arange(250), num_shards)
    rule = Rule(threshold, 12, None, seed=0)
    pairs = merge([search(IvfEngine(prepared, s, cells), queries, rule) for s in shards], queries, rule).pairs

    own_cell = nearest_cells(base, cells.centroids_CD, 1)[:, 0]
    probes = nearest_cells(base, cells.centroids_CD, 3)
    units = reference.similarity_units(base)
    for image in range(250):
        if not base[image].any():
            continue  # a zero vector is near no cell
        seen = [j for j in range(250) if j != image and own_cell[j] in probes[image]]
        hits = [] if threshold is None else [j for j in seen if units[image, j] >= round(threshold * 2**22)]
        if len(hits) < 12:
            hits = sorted(seen, key=lambda j: (-units[image, j], j))[:12]
        assert sorted(pairs.ids_P[pairs.rows_P == image].tolist()) == sorted(hits)


def test_all_cells_give_the_exact_graph() -> None:
    features = manifold(600)
    exact = build(features, NeighborsConfig(method="exact"), num_clusters=5, seed=0).graph
    prepared = prepare(features, True)
    cells = plan_cells(prepared, 0, min_recall=1.0, min_size=5)
    every = Cells(cells.centroids_CD, len(cells.centroids_CD), 1.0, 1.0)
    rule = Rule(None, 20, None, seed=0)
    queries = Queries.of(prepared, np.arange(600))
    answer = search(IvfEngine(prepared, np.arange(600), every), queries, rule)
    _, nearest = most_similar(prepared, np.arange(600), 20)
    found = merge([answer], queries, rule).pairs
    for image in range(600):
        assert sorted(found.ids_P[found.rows_P == image].tolist()) == sorted(nearest[image].tolist())
    assert exact.num_images == 600


def test_the_recall_that_is_stated_is_the_recall_of_the_graph() -> None:
    features = manifold(6000)
    config = NeighborsConfig(method="ivf", similarity_threshold=None, min_neighbors=50, max_neighbors=50)
    built = build(features, config, num_clusters=10, seed=0)
    audit = built.audit
    assert audit.method == "ivf"
    assert audit.operations_share < 0.5
    _, nearest = most_similar(prepare(features, True), np.arange(6000), 50)
    found = [len(np.intersect1d(built.graph.neighbors_of(image), nearest[image])) for image in range(6000)]
    recall = np.mean(found) / 50
    assert recall > 0.93
    assert audit.recall == pytest.approx(recall, abs=0.03)


def test_no_cell_holds_fewer_images_than_a_list_needs() -> None:
    features = np.concatenate([manifold(1000), 50 * np.eye(48)[:20]]).astype(np.float32)
    prepared = prepare(features, False)
    cells = plan_cells(prepared, 0, min_recall=0.9, min_size=21)
    sizes = np.bincount(nearest_cells(prepared[:], cells.centroids_CD, 1)[:, 0], minlength=len(cells.centroids_CD))
    assert sizes.min() >= 21


def test_auto_is_exact_for_few_images_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(manifold(4000), True)
    cells, reason = choose_method(prepared, NeighborsConfig(), 0, predicted_s=7200)
    assert cells is None
    assert reason == "few enough images: 7.7e+08 products, about 2.0 hours for one such process"
    monkeypatch.setattr(ivf, "MAX_EXACT_PRODUCTS", 1e6)
    cells, reason = choose_method(prepared, NeighborsConfig(), 0, predicted_s=7200)
    assert cells is not None
    assert reason.startswith("many images: ")
    noise = prepare(np.random.default_rng(0).standard_normal((2000, 64)).astype(np.float32), True)
    cells, reason = choose_method(noise, NeighborsConfig(), 0, predicted_s=7200)
    assert cells is None
    assert reason.startswith("an inverted file would save too little: ")
