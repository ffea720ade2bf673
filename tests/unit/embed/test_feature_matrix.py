from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from icce_ray.embed import feature_matrix as features_module
from icce_ray.embed.feature_matrix import load_features
from icce_ray.errors import DamagedArtifactError
from icce_ray.store import Artifact, Folder
from icce_ray.store.cache import cache_folder


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICCE_CACHE", str(tmp_path / "cache"))


def random_rows(num_images: int, dim: int, dtype: Any = np.float16) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((num_images, dim)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("rows_per_part", [1, 3, 7, 100])
def test_the_matrix_holds_the_rows_of_all_parts_in_order(
    make_embed_artifact: Any, dtype: Any, rows_per_part: int
) -> None:
    rows = random_rows(20, 5, dtype)
    features = load_features(make_embed_artifact(rows, rows_per_part, failed=(0, 4, 5, 6, 22), feature_set="pixels"))
    assert features.matrix.dtype == dtype
    assert np.array_equal(features.matrix, rows)
    assert np.array_equal(features.image_ids, np.setdiff1d(np.arange(25), (0, 4, 5, 6, 22)))
    assert (features.num_images, features.dim, features.name) == (20, 5, "pixels")


def test_the_matrix_cannot_be_written_to(make_embed_artifact: Any) -> None:
    features = load_features(make_embed_artifact(random_rows(6, 4), 2))
    with pytest.raises(ValueError, match="read-only"):
        features.matrix[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        features.image_ids[0] = 1


def test_a_part_without_good_images_is_no_obstacle(make_embed_artifact: Any) -> None:
    rows = random_rows(4, 3)
    features = load_features(make_embed_artifact(rows, 2, failed=(0, 1, 4, 5)))
    assert np.array_equal(features.matrix, rows)


def test_the_parts_are_plain_parquet_with_a_fixed_width(make_embed_artifact: Any) -> None:
    rows = random_rows(4, 3)
    artifact = make_embed_artifact(rows, 4)
    table = pq.read_table(artifact.folder.local_path / "part-00000.parquet")
    assert table.schema.names == ["image_id", "embedding", "content_hash"]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: halffloat>[3]"
    assert np.array_equal(np.stack(table.to_pandas()["embedding"]), rows)


def test_the_parts_are_read_once_per_machine(make_embed_artifact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_embed_artifact(random_rows(6, 4), 2)
    first = load_features(artifact)
    monkeypatch.setattr(features_module, "_build", lambda *args: pytest.fail("built twice"))
    assert np.array_equal(load_features(artifact).matrix, first.matrix)


def test_a_damaged_copy_on_this_machine_is_made_again(make_embed_artifact: Any) -> None:
    artifact = make_embed_artifact(random_rows(6, 4), 2)
    expected = np.array(load_features(artifact).matrix)
    (path,) = cache_folder().rglob("features-*.npy")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert np.array_equal(load_features(artifact).matrix, expected)


def test_other_bytes_under_the_same_fingerprint_are_not_mixed_up(make_embed_artifact: Any) -> None:
    rows = random_rows(6, 4)
    load_features(make_embed_artifact(rows, 2))
    assert np.array_equal(load_features(make_embed_artifact(rows + 1, 2, name="other")).matrix, rows + 1)


def test_a_damaged_part_is_refused_and_leaves_nothing_behind(make_embed_artifact: Any) -> None:
    artifact = make_embed_artifact(random_rows(6, 4), 2)
    path = artifact.folder.local_path / "part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedArtifactError, match="part-00001"):
        load_features(artifact)
    assert not [path for path in cache_folder().rglob("*") if "npy" in path.name]


def _load_elsewhere(uri: str, barrier: Any, results: Any) -> None:
    artifact = Artifact.find(Folder.at(uri))
    assert artifact is not None
    barrier.wait()
    results.put(load_features(artifact).matrix.sum(dtype=np.float64))


def test_processes_that_load_at_once_all_get_the_whole_matrix(make_embed_artifact: Any) -> None:
    rows = random_rows(5000, 16)
    artifact = make_embed_artifact(rows, 100)
    methods = multiprocessing.get_context("fork")
    barrier, results = methods.Barrier(4, timeout=60), methods.Queue()
    workers = [methods.Process(target=_load_elsewhere, args=(artifact.folder.uri, barrier, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    sums = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sums == [rows.sum(dtype=np.float64)] * 4
    assert len(list(cache_folder().rglob("*.npy"))) == 2
