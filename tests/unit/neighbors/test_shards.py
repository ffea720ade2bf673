"""The shard workers without Ray: what the job asks of them, in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from icce_ray.config import Config
from icce_ray.neighbors import graph_rows as rows_module
from icce_ray.neighbors.duplicates import leaders
from icce_ray.neighbors.graph import build
from icce_ray.neighbors.shards import (
    Finished,
    PartTask,
    ShardWorker,
    plan_parts,
    read_duplicates,
    source_of,
    write_leaders,
)
from icce_ray.store import Artifact, ArtifactWriter, Folder

from . import reference

FEATURES = reference.awkward_features(230, 6).astype(np.float16)


@pytest.fixture
def embed(tmp_path: Path) -> Artifact:
    writer = ArtifactWriter(Folder.at(tmp_path / "embed"))
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(FEATURES.ravel()), FEATURES.shape[1])
    writer.write_table("part-00000.parquet", pa.table({"image_id": np.arange(230), "embedding": embedding}))
    name = tmp_path.name
    return writer.commit(stage="embed", fingerprint=name, inputs={}, config={}, metrics={}, seconds=0.0)


def config(**neighbors: Any) -> Config:
    settings = {"similarity_threshold": 0.6, "min_neighbors": 9, "max_neighbors": 30} | neighbors
    return Config(output="unused", num_clusters=4, embeddings={"uri": "unused.npy"}, neighbors=settings)


def build_on_shards(
    settings: Config, embed: Artifact, folder: Folder, num_shards: int
) -> tuple[list[PartTask], npt.NDArray[np.int64] | None]:
    """All that the job does, one call after the other. Every call gets a new worker: all come from storage."""
    source = source_of(settings, embed, 0)

    def worker(shard: int) -> ShardWorker:
        return ShardWorker(settings, embed, folder, source, shard, num_shards, 1, None)

    def make(task: PartTask) -> None:
        answers = [worker(shard).answer(task) for shard in range(num_shards)]
        worker(task.number % num_shards).make(task, *answers)
        assert Finished.find(folder, task.name, source) is not None

    worker(0).audit()
    tasks = plan_parts(230)
    for task in tasks:
        make(task)
    leader_N = leaders(230, read_duplicates(folder, tasks), min_leaders=10)
    if leader_N is not None:
        write_leaders(folder, leader_N)
        tasks = [replace(task, among_leaders=True) for task in tasks]
        for task in tasks:
            make(task)
    return tasks, leader_N


def lists_of(folder: Folder, tasks: list[PartTask]) -> list[list[int]]:
    lists = []
    for task in tasks:
        assert folder.local_path is not None
        indptr = np.load(folder.local_path / f"{task.name}-indptr.npy")
        indices = np.load(folder.local_path / f"{task.name}-indices.npy")
        lists += [part.tolist() for part in np.split(indices, indptr[1:-1])]
    return lists


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "QUERY_BLOCK", 50)


@pytest.mark.parametrize("num_shards", [1, 2, 7])
@pytest.mark.parametrize("settings", [{}, {"center": False}])
def test_shards_that_know_storage_only_make_the_graph_of_one_process(
    settings: dict[str, Any], num_shards: int, embed: Artifact, tmp_path: Path
) -> None:
    built = build(FEATURES, config(**settings).neighbors, num_clusters=4, seed=0)
    folder = Folder.at(tmp_path / "out")
    tasks, leader_N = build_on_shards(config(**settings), embed, folder, num_shards)
    assert len(tasks) == 5
    assert leader_N is not None
    assert np.array_equal(leader_N, built.leader_N)
    assert lists_of(folder, tasks) == reference.lists_of(built.graph)
