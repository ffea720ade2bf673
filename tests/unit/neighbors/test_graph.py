from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from icce_ray.config import NeighborsConfig
from icce_ray.errors import InputError
from icce_ray.neighbors import adaptive_rule as rule_module
from icce_ray.neighbors import graph as graph_module
from icce_ray.neighbors import neighbor_precision as precision
from icce_ray.neighbors import search, torch_engine
from icce_ray.neighbors.adaptive_rule import PairList, Rule, keep, pair_hash
from icce_ray.neighbors.graph import (
    NeighborGraph,
    Rows,
    build_graph,
    load_graph,
    merge_shards,
    part_ranges,
    search_shard,
)
from icce_ray.runtime import threads
from icce_ray.sample import unit_features as prepared_module
from icce_ray.sample.unit_features import UnitFeatures, prepare
from icce_ray.store import Artifact, ArtifactWriter, Folder

from .. import features as reference


def build(features: np.ndarray, **settings: object) -> NeighborGraph:
    config = NeighborsConfig(**{"max_neighbors": None} | settings)  # type: ignore[arg-type]
    return build_graph(features, config, num_clusters=5, seed=3)[0]


def shrink_blocks(monkeypatch: pytest.MonkeyPatch, query: int, base: int) -> None:
    for module in (search, graph_module):
        monkeypatch.setattr(module, "QUERY_BLOCK", query)
    monkeypatch.setattr(torch_engine, "SCORES_PER_BLOCK", {"cpu": query * base})
    monkeypatch.setattr(graph_module, "MAX_ROWS_PER_PART", query * 2)


def build_rows(prepared: UnitFeatures, start: int, stop: int, rule: Rule, num_shards: int = 1) -> Rows:
    ids = np.arange(start, stop)
    engines = [
        torch_engine.TorchEngine(prepared, shard) for shard in np.array_split(np.arange(len(prepared)), num_shards)
    ]
    answers = [search_shard(engine, prepared, ids, rule) for engine in engines]
    return merge_shards(answers, prepared, ids, rule)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(
    ("num_images", "threshold", "min_neighbors"),
    [(331, 0.5, 20), (331, None, 20), (331, 0.0, 10), (331, -1.0, 1), (331, 1.0, 12), (40, 0.9, 200), (2, 0.5, 50)],
)
def test_the_graph_is_that_of_brute_force(
    num_images: int, threshold: float | None, min_neighbors: int, center: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_blocks(monkeypatch, 50, 70)
    features = np.random.default_rng(1).standard_normal((2, 4)) if num_images == 2 else None
    features = reference.awkward_features(num_images, 6) if features is None else features
    graph = build(features, similarity_threshold=threshold, min_neighbors=min_neighbors, center=center)
    expected = reference.neighbor_lists(prepare(features, center)[:], threshold, min_neighbors)
    assert reference.lists_of(graph) == expected


@pytest.mark.parametrize(("threshold", "min_neighbors"), [(0.3, 12), (None, 20), (0.9, 4)])
def test_the_nearest_are_the_most_similar_of_each_row_whatever_the_shards(
    threshold: float | None, min_neighbors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_blocks(monkeypatch, 50, 70)
    features = reference.awkward_features(331, 6)
    graph = build(features, similarity_threshold=threshold, min_neighbors=min_neighbors, max_neighbors=40)
    assert graph.nearest_Nk is not None
    prepared = prepare(features, True)
    for image, neighbors in enumerate(reference.lists_of(graph)):
        row = np.array(neighbors)
        units = prepared_module.exact_similarity(prepared, np.full(len(row), image), prepared, row)
        expected = np.sort(row[np.lexsort((row, -units))][: graph_module.NUM_NEAREST])
        assert np.array_equal(graph.nearest_Nk[image, : len(expected)], expected)
        assert (graph.nearest_Nk[image, len(expected) :] == -1).all()
    rule = Rule(threshold, min_neighbors, 40, seed=3)
    for num_shards in (1, 3):
        rows = build_rows(prepared, 100, 200, rule, num_shards)
        assert np.array_equal(rows.nearest, graph.nearest_Nk[100:200])


def test_the_graph_is_the_same_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_blocks(monkeypatch, 20, 70)
    features = reference.awkward_features(331, 6)
    config = NeighborsConfig(similarity_threshold=0.5, min_neighbors=20)
    graphs = [
        build_graph(features, config, num_clusters=5, seed=3, num_threads=num_threads)[0] for num_threads in (1, 5)
    ]
    assert np.array_equal(graphs[0].indptr, graphs[1].indptr)
    assert np.array_equal(graphs[0].indices, graphs[1].indices)


def test_no_image_is_its_own_neighbour_where_blocks_meet_but_its_duplicate_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_blocks(monkeypatch, 64, 96)
    features = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    pairs = [(63, 64), (95, 96), (127, 128), (191, 192), (0, 399), (383, 384)]
    for first, second in pairs:
        features[second] = features[first]
    for threshold in (None, 0.2, 0.999):
        graph = build(features, similarity_threshold=threshold, min_neighbors=5)
        lists = reference.lists_of(graph)
        for image, neighbors in enumerate(lists):
            assert image not in neighbors
        for first, second in pairs:
            assert second in lists[first]
            assert first in lists[second]


@pytest.mark.parametrize(("query", "base"), [(1, 1000), (7, 13), (100, 100), (5000, 5000)])
def test_blocks_do_not_change_the_graph(query: int, base: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features = reference.awkward_features(105, 6)
    settings = {"similarity_threshold": 0.3, "min_neighbors": 15, "max_neighbors": 25}
    graph = build(features, **settings)
    shrink_blocks(monkeypatch, query, base)
    monkeypatch.setattr(search, "PAIRS_HELD", 100)
    again = build(features, **settings)
    assert np.array_equal(graph.indptr, again.indptr)
    assert np.array_equal(graph.indices, again.indices)


def test_threads_do_not_change_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    # Many chunks and blocks, so that several threads have something to do.
    monkeypatch.setattr(search, "CHUNK_ELEMENTS", 16 * 200)
    monkeypatch.setattr(prepared_module, "ELEMENTS_PER_BLOCK", 16 * 100)
    monkeypatch.setattr(precision, "LABEL_BLOCK", 100)
    monkeypatch.setattr(precision, "QUERY_BLOCK", 100)
    features = reference.awkward_features(1500, 16)
    graphs = []
    for num_threads in (1, 5):
        threads.set_threads(num_threads)
        graphs.append(build(features, similarity_threshold="auto", min_neighbors=30, max_neighbors=100))
    threads.set_threads(1)
    for graph in graphs[1:]:
        assert np.array_equal(graphs[0].indptr, graph.indptr)
        assert np.array_equal(graphs[0].indices, graph.indices)


def test_the_first_feature_that_is_not_finite_is_named_whatever_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_module, "ELEMENTS_PER_BLOCK", 3 * 4)
    features = np.ones((100, 3), np.float32)
    features[[97, 41, 40], [0, 1, 2]] = np.inf
    threads.set_threads(4)
    try:
        with pytest.raises(InputError, match="row 40 "):
            prepare(features, center=True)
    finally:
        threads.set_threads(1)


def test_long_lists_keep_a_subset_of_the_right_size_that_the_seed_decides() -> None:
    prepared = prepare(reference.awkward_features(300, 6), center=True)
    full = reference.neighbor_lists(prepared[:], 0.1, 10)
    subsets = []
    for seed in (0, 1):
        rows = build_rows(prepared, 0, 300, Rule(0.1, 10, 30, seed=seed))
        lists = [part.tolist() for part in np.split(rows.indices, rows.indptr[1:-1])]
        for kept, whole in zip(lists, full, strict=True):
            assert len(kept) == min(30, len(whole))
            assert set(kept) <= set(whole)
            assert kept == sorted(kept)
        subsets.append(lists)
    assert subsets[0] != subsets[1]


def test_the_random_subset_is_uniform() -> None:
    prepared = prepare(np.ones((101, 2), np.float32), center=False)
    rows = build_rows(prepared, 0, 101, Rule(0.5, 1, 50, seed=5))
    picks = Counter(rows.indices.tolist())
    # Each image is picked by each of the 100 others with probability 1/2: 50 +- 5.
    assert min(picks.values()) > 25
    assert max(picks.values()) < 75


def test_pair_hashes_differ_by_seed_row_and_column_and_fill_the_range() -> None:
    rows, columns = np.divmod(np.arange(10_000), 100)
    hashes = pair_hash(0, rows, columns)
    assert len(np.unique(hashes)) == 10_000
    assert not (hashes == pair_hash(1, rows, columns)).any()
    assert not (hashes[rows != columns] == pair_hash(0, columns, rows)[rows != columns]).any()
    assert abs((hashes / 2.0**64).mean() - 0.5) < 0.02


@pytest.mark.parametrize("unlike_bits", [0, 3, 64])
def test_of_equal_hashes_the_lower_ids_come_first(unlike_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows, num_images = 100, 30
    rows, ids = np.divmod(np.random.default_rng(0).permutation(num_rows * num_images), num_images)
    hashes = np.random.default_rng(1).integers(0, 2**64, len(rows), dtype=np.uint64)
    hashes = hashes >> np.uint64(64 - unlike_bits) if unlike_bits else np.zeros_like(hashes)
    monkeypatch.setattr(rule_module, "pair_hash", lambda *_: hashes)
    pairs = PairList(rows.astype(np.int32), ids, np.zeros(len(rows), np.float32), np.ones(len(rows), bool))
    rule = Rule(0.0, 1, 10, seed=0)
    kept = keep(pairs, np.full(num_rows, num_images), np.arange(num_rows), rule, 0.0, lambda rows, ids: ids)
    expected = sorted(zip(rows.tolist(), hashes.tolist(), ids.tolist(), strict=True))
    expected = [[place for _, _, place in expected[row * num_images :][:10]] for row in range(num_rows)]
    assert [sorted(kept.ids_P[kept.rows_P == row]) for row in range(num_rows)] == [sorted(ids) for ids in expected]


def test_rows_depend_on_the_features_only_not_on_where_a_part_starts() -> None:
    prepared = prepare(reference.awkward_features(250, 6), center=True)
    rule = Rule(0.8, 12, 20, seed=1)
    whole = build_rows(prepared, 0, 250, rule)
    cuts = [0, 1, 90, 91, 200, 250]
    parts = [build_rows(prepared, *ends, rule, num_shards=1 + n) for n, ends in enumerate(itertools.pairwise(cuts))]
    assert np.array_equal(np.concatenate([part.indices for part in parts]), whole.indices)
    assert np.array_equal(np.concatenate([part.lengths for part in parts]), whole.lengths)
    assert np.array_equal(np.concatenate([part.num_hits for part in parts]), whole.num_hits)
    assert 0 < (whole.num_hits < 12).sum() < 250


@pytest.mark.parametrize("num_images", [2, 1023, 1024, 1025, 70_001, 2_000_000])
def test_parts_cover_each_row_once(num_images: int) -> None:
    ranges = part_ranges(num_images)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == num_images
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    assert max(stop - start for start, stop in ranges) <= search.MAX_ROWS_PER_PART


def test_a_feature_that_is_not_finite_is_refused() -> None:
    features = np.ones((10, 3), np.float32)
    features[2, 2] = np.nan
    with pytest.raises(InputError, match="row 2"):
        build(features)


def write_artifact(folder: Path, graph: NeighborGraph, cuts: list[int]) -> Artifact:
    writer = ArtifactWriter(Folder.at(folder))
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        pointers = graph.indptr[start : stop + 1]
        writer.write_array(f"part-{number:05d}-indptr.npy", pointers - pointers[0])
        writer.write_array(f"part-{number:05d}-indices.npy", graph.indices[pointers[0] : pointers[-1]])
    return writer.commit(
        stage="neighbors", fingerprint="0123456789abcdef", inputs={}, config={}, metrics={}, seconds=0.0
    )


@pytest.mark.parametrize("cuts", [[0, 90], [0, 1, 40, 90]])
def test_a_written_graph_comes_back_memory_mapped_whatever_its_parts(
    cuts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICCE_CACHE", str(tmp_path / "cache"))
    graph = build(reference.awkward_features(90, 4), similarity_threshold=0.5, min_neighbors=5)
    artifact = write_artifact(tmp_path / "artifact", graph, cuts)
    for _ in range(2):
        loaded = load_graph(artifact)
        assert isinstance(loaded.indices, np.memmap)
        assert np.array_equal(loaded.indptr, graph.indptr)
        assert np.array_equal(loaded.indices, graph.indices)
        assert loaded.indices.dtype == np.int32
        assert len(loaded.indices) == len(graph.indices) == graph.degrees.sum()


def test_an_artifact_made_anew_is_not_mistaken_for_its_old_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICCE_CACHE", str(tmp_path / "cache"))
    for threshold in (0.5, 0.7):
        graph = build(reference.awkward_features(90, 4), similarity_threshold=threshold, min_neighbors=5)
        loaded = load_graph(write_artifact(tmp_path / "artifact", graph, [0, 50, 90]))
        assert np.array_equal(loaded.indices, graph.indices)
