"""The shard workers without Ray: what the job asks of them, in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.config import NeighborsConfig
from icce_ray.neighbors import graph as graph_module
from icce_ray.neighbors.graph import build_graph
from icce_ray.neighbors.job import GraphTask, ShardWorker
from icce_ray.store import Artifact, ArtifactWriter, Folder
from icce_ray.store.part_records import PartRecords

from ..features import awkward_features, lists_of

FEATURES = awkward_features(230, 6).astype(np.float16)


@pytest.fixture
def embed(tmp_path: Path) -> Artifact:
    writer = ArtifactWriter(Folder.at(tmp_path / "embed"))
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(FEATURES.ravel()), FEATURES.shape[1])
    writer.write_table("part-00000.parquet", pa.table({"image_id": np.arange(230), "embedding": embedding}))
    name = tmp_path.name
    return writer.commit(stage="embed", fingerprint=name, inputs={}, config={}, metrics={}, seconds=0.0)


@pytest.mark.parametrize("num_shards", [1, 2, 7])
@pytest.mark.parametrize("changes", [{}, {"center": False}])
def test_shards_that_know_storage_only_make_the_graph_of_one_process(
    changes: dict[str, Any], num_shards: int, embed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_module, "QUERY_BLOCK", 50)
    config = NeighborsConfig(similarity_threshold=0.6, min_neighbors=9, max_neighbors=30, **changes)
    graph, audit = build_graph(FEATURES, config, num_clusters=4, seed=0)
    records = PartRecords(Folder.at(tmp_path / "out"), "source")
    task = GraphTask(embed, config, num_clusters=4, seed=0, records=records)

    def worker(shard: int) -> ShardWorker:
        """Every call gets a new worker: it has nothing but what lies on storage."""
        return ShardWorker(task, shard, num_shards, 1, "cpu")

    assert [file.name for file in worker(0).audit().files] == ["audit.json", "mean.npy"][: 2 if config.center else 1]
    assert replace(task.read_audit(), predicted_s=0) == replace(audit, predicted_s=0)
    assert len(task.parts) == 5
    lists = []
    for part in task.parts:
        answers = [worker(shard).answer(part) for shard in range(num_shards)]
        record = worker(part.number % num_shards).make(part, *answers)
        assert records.read(part.name) == record
        indptr, indices, nearest = (np.load(tmp_path / "out" / file.name) for file in record.files)
        assert graph.nearest_Nk is not None
        assert np.array_equal(nearest, graph.nearest_Nk[part.start : part.stop])
        lists += [row.tolist() for row in np.split(indices, indptr[1:-1])]
    assert lists == lists_of(graph)
