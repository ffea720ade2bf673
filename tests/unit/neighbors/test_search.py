from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from icce_ray.neighbors import adaptive_rule as rule_module
from icce_ray.neighbors import search as search_module
from icce_ray.neighbors import torch_engine
from icce_ray.neighbors.adaptive_rule import Queries, Rule
from icce_ray.neighbors.search import merge, most_similar, needed_bytes, search, shard_bytes
from icce_ray.neighbors.torch_engine import TorchEngine
from icce_ray.sample import unit_features
from icce_ray.sample.unit_features import RESOLUTION, UnitFeatures, exact_similarity, prepare

from .. import features as reference


class GpuEngine(TorchEngine):
    """Computes on a CPU what a GPU would."""

    in_halves = True  # type: ignore[assignment]


ENGINES = {"cpu": TorchEngine, "gpu": GpuEngine}


def lists_found(
    prepared: UnitFeatures, ids: np.ndarray, rule: Rule, num_shards: int, engine: str = "cpu"
) -> list[list[int]]:
    """The neighbours of each of `ids`, ascending, from so many shards."""
    queries = Queries(prepared, ids)
    shards = np.array_split(np.arange(len(prepared)), num_shards)
    answers = [search(ENGINES[engine](prepared, shard), queries, rule) for shard in shards]
    pairs = merge(answers, queries, rule).pairs
    return [sorted(pairs.ids_P[pairs.rows_P == row].tolist()) for row in range(len(ids))]


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine, "LOADED_ROWS", 70)
    monkeypatch.setattr(torch_engine, "SCORES_PER_BLOCK", {"cpu": 301 * 70})
    monkeypatch.setattr(torch_engine, "GATHERED_SCORES", 600)
    monkeypatch.setattr(torch_engine, "PAIRS_AT_A_TIME", {"cpu": 1500})
    monkeypatch.setattr(search_module, "PAIRS_HELD", 500)
    monkeypatch.setattr(search_module, "QUERY_BLOCK", 50)
    monkeypatch.setattr(search_module, "CHUNK_ELEMENTS", 5 * 64)
    monkeypatch.setattr(rule_module, "PADDED_ELEMENTS", 100)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(("engine", "num_shards"), [("cpu", 1), ("cpu", 3), ("cpu", 7), ("gpu", 1), ("gpu", 3)])
@pytest.mark.parametrize("threshold", [None, -1.0, 0.0, 0.35, 1.0])
def test_any_shards_and_engine_find_the_neighbours_of_brute_force(
    threshold: float | None, num_shards: int, engine: str
) -> None:
    prepared = prepare(reference.awkward_features(301, 5), center=True)
    rule = Rule(threshold, 20, None, seed=0)
    expected = reference.neighbor_lists(prepared[:], threshold, 20)
    assert lists_found(prepared, np.arange(301), rule, num_shards, engine) == expected


@pytest.mark.parametrize("threshold", [None, 0.35])
def test_shards_of_one_image_find_the_neighbours_of_brute_force(threshold: float | None) -> None:
    prepared = prepare(reference.awkward_features(60, 5), center=True)
    expected = reference.neighbor_lists(prepared[:], threshold, 10)
    assert lists_found(prepared, np.arange(60), Rule(threshold, 10, None, seed=0), 60) == expected


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("engine", ENGINES)
def test_longer_lists_than_there_are_images_hold_all_others(engine: str) -> None:
    prepared = prepare(reference.awkward_features(40, 5), center=False)
    found = lists_found(prepared, np.arange(40), Rule(0.9, 39, None, seed=0), 3, engine)
    assert found == [[other for other in range(40) if other != image] for image in range(40)]


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("num_shards", [2, 3, 7])
def test_cut_rows_do_not_depend_on_shards(num_shards: int) -> None:
    prepared = prepare(reference.awkward_features(301, 5), center=True)
    rule = Rule(0.3, 10, 15, seed=4)
    queries = Queries(prepared, np.arange(301))
    results = []
    for count in (1, num_shards):
        shards = np.array_split(np.arange(301), count)
        merged = merge([search(TorchEngine(prepared, s), queries, rule) for s in shards], queries, rule)
        order = np.lexsort((merged.pairs.ids_P, merged.pairs.rows_P))
        results.append((merged.pairs.rows_P[order], merged.pairs.ids_P[order], merged.num_hits_Q))
    assert (results[0][2] > 15).sum() > 50
    for one, several in zip(*results, strict=True):
        assert np.array_equal(one, several)


class ShakyEngine(TorchEngine):
    """Off by up to `error`, at random: rows moved so far move no score further."""

    def __init__(self, prepared: UnitFeatures, ids: np.ndarray) -> None:
        super().__init__(prepared, ids)
        moved = np.random.default_rng(0).standard_normal(self._rows_nD.shape)
        moved *= (0.02 - self.error) / np.linalg.norm(moved, axis=1, keepdims=True)
        self._scored_nD = (self._rows_nD + torch.from_numpy(moved)).to(self._scored_nD.dtype)
        self.error = 0.02


class ShakyGpuEngine(ShakyEngine, GpuEngine):
    pass


@pytest.mark.parametrize("engine", [ShakyEngine, ShakyGpuEngine])
@pytest.mark.parametrize(("num_images", "num_shards"), [(60, 1), (200, 1), (200, 2)])
def test_scores_that_the_engine_gets_wrong_within_its_bound_change_nothing(
    num_images: int, num_shards: int, engine: type[TorchEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "SCORES_PER_BLOCK", {"cpu": num_images * 64})
    prepared = prepare(reference.awkward_features(num_images, 6), center=True)
    rule = Rule(0.7, 15, None, seed=0)
    queries = Queries(prepared, np.arange(num_images))
    shards = np.array_split(np.arange(num_images), num_shards)
    pairs = merge([search(engine(prepared, s), queries, rule) for s in shards], queries, rule).pairs
    found = [sorted(pairs.ids_P[pairs.rows_P == row].tolist()) for row in range(num_images)]
    assert found == reference.neighbor_lists(prepared[:], 0.7, 15)


@pytest.mark.parametrize("dim", [3, 64, 300])
@pytest.mark.parametrize("engine", ENGINES)
def test_scores_are_within_the_error_that_an_engine_states(engine: str, dim: int) -> None:
    prepared = prepare(np.random.default_rng(dim).standard_normal((150, dim)).astype(np.float32), center=True)
    searcher = ENGINES[engine](prepared, np.arange(150))
    (found,) = searcher.pairs(Queries(prepared, np.arange(150)), Rule(-1.0, 149, None, seed=0))
    exact = exact_similarity(prepared[:], found.rows_P, prepared, found.ids_P) * RESOLUTION
    assert len(found) == 150 * 149
    assert np.abs(found.scores_P - exact).max() < searcher.error


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("k", [1, 40, 149, 1000])
@pytest.mark.parametrize("center", [True, False])
def test_the_most_similar_are_those_of_brute_force_with_ties_to_the_lower_id(k: int, center: bool) -> None:
    prepared = prepare(reference.awkward_features(150, 5), center)
    base = prepared[:]
    units = reference.similarity_units(base)
    similarities, ids = most_similar(prepared, np.arange(150), k)
    assert ids.shape == (150, min(k, 149))
    for image in range(150):
        assert sorted(ids[image].tolist()) == sorted(reference.nearest(units, image, k))
    np.testing.assert_allclose(similarities, np.take_along_axis(base @ base.T, ids, axis=1), atol=1e-6)
    assert (np.diff(similarities, axis=1) <= 0).all()


def test_many_ties_go_to_the_lower_ids() -> None:
    prepared = prepare(np.repeat(np.eye(3, dtype=np.float32), 200, axis=0), center=False)
    _, ids = most_similar(prepared, np.array([0, 150, 599]), 10)
    assert sorted(ids[0].tolist()) == list(range(1, 11))
    assert sorted(ids[1].tolist()) == list(range(10))
    assert sorted(ids[2].tolist()) == list(range(400, 410))


def test_a_zero_query_gets_the_lowest_ids() -> None:
    rows = np.vstack([np.zeros((2, 4)), np.random.default_rng(0).standard_normal((30, 4))])
    similarities, ids = most_similar(prepare(rows, center=False), np.array([1]), 3)
    assert ids.tolist() == [[0, 2, 3]]
    assert similarities.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("threshold", [None, 0.9])
@pytest.mark.parametrize("scores_per_block", [40 * 1280, 40 * 6400, 2**28])
@pytest.mark.parametrize(("k", "dim"), [(1, 9), (20, 9), (20, 64)])
def test_a_gpu_looks_at_few_pairs_and_hands_out_only_those_that_may_stay(
    k: int, dim: int, scores_per_block: int, threshold: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "SCORES_PER_BLOCK", {"cpu": scores_per_block})
    num_looked_at = []
    kept = TorchEngine._kept
    monkeypatch.setattr(
        GpuEngine, "_kept", lambda self, pairs, *rest: num_looked_at.append(len(pairs)) or kept(self, pairs, *rest)
    )
    rng = np.random.default_rng(0)
    # Sorted by class, as collections often are: the most similar images stand beside each other.
    centres = np.repeat(rng.standard_normal((20, dim)), 1000, axis=0)
    prepared = prepare((centres + rng.standard_normal((20_000, dim))).astype(np.float32), center=True)
    engine = GpuEngine(prepared, np.arange(20_000))
    queries = Queries(prepared, np.arange(0, 20_000, 500))
    (found,) = engine.pairs(queries, Rule(threshold, k, None, seed=0))
    num_hits = np.bincount(found.rows_P[found.is_hit_P], minlength=len(queries))
    assert (np.bincount(found.rows_P, minlength=len(queries)) == np.maximum(num_hits, k)).all()
    assert (num_hits.sum() > 100) == (threshold is not None and dim == 9)
    # A block after the other, each from scratch, would look at k of each.
    num_blocks = -(-20_000 * len(queries) // scores_per_block)
    wanted = (k + 1) * sum(1 / (1 + block) for block in range(num_blocks)) + num_hits.mean()
    assert sum(num_looked_at) / len(queries) < 1.5 * wanted + 10


@pytest.mark.parametrize("engine", ENGINES)
def test_exact_similarities_do_not_depend_on_how_pairs_are_cut(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(reference.awkward_features(60, 9), center=True)
    searcher = ENGINES[engine](prepared, np.arange(60))
    rows, columns = (ids.astype(dtype) for ids, dtype in zip(np.divmod(np.arange(3600), 60), "il", strict=True))
    queries = Queries(prepared, np.arange(60))
    units = searcher.exact(queries, rows, columns)
    monkeypatch.setattr(unit_features, "ELEMENTS_PER_BLOCK", 9 * 7)
    monkeypatch.setattr(torch_engine, "RESCORED_ELEMENTS", 9 * 7)
    assert np.array_equal(searcher.exact(queries, rows, columns), units)
    assert np.array_equal(units.reshape(60, 60), reference.similarity_units(prepared[:]))


@pytest.mark.gpu
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_a_gpu_finds_the_neighbours_of_a_cpu(threshold: float | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    rng = np.random.default_rng(0)
    features = rng.standard_normal((40, 256))[rng.integers(0, 40, 20_000)] + 1.5 * rng.standard_normal((20_000, 256))
    features[1000:1100] = features[0]
    prepared = prepare(features.astype(np.float16), center=True)
    rule = Rule(threshold, 50, 300, seed=1)
    queries = Queries(prepared, np.arange(0, 20_000, 10))
    results = []
    for engine in (TorchEngine(prepared, np.arange(20_000), device) for device in ("cpu", "cuda")):
        pairs = merge([search(engine, queries, rule)], queries, rule).pairs
        order = np.lexsort((pairs.ids_P, pairs.rows_P))
        results.append((pairs.rows_P[order], pairs.ids_P[order]))
    for cpu, gpu in zip(*results, strict=True):
        assert np.array_equal(cpu, gpu)


def test_a_machine_needs_the_share_of_its_workers() -> None:
    base = shard_bytes(1_000_000, 1023)
    assert base == 1_000_000 * (1023 * 4 + 8)
    assert needed_bytes(base, 10**9, num_here=2, num_workers=8) == math.ceil(base / 4) + 2 * 10**9
