from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray import cut_hierarchy
from icce_ray.consensus.hierarchy import HIERARCHY_NAME, merge_clusters
from icce_ray.errors import InputError
from icce_ray.export.cut import SCHEMA, write_cut
from icce_ray.store import ArtifactWriter, Folder

CLUSTERS = np.array([0, 1, 2, 3, -1, 1], dtype=np.int32)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A run of four clusters: 0 and 2 are confused most, then 1 and 3."""
    together = np.eye(4)
    together[0, 2] = together[2, 0] = 0.5
    together[1, 3] = together[3, 1] = 0.3
    tree = merge_clusters(together, np.array([1, 2, 1, 1]))
    assignments = pa.table(
        {"image_id": range(6), "uri": list("abcdef"), "cluster": CLUSTERS, "consensus_probability": [1.0] * 6}
    )
    for stage, tables in {
        "consensus": {HIERARCHY_NAME: tree.to_table()},
        "assign": {f"assignments/part-{i}.parquet": assignments.slice(4 * i, 4) for i in range(2)},
    }.items():
        writer = ArtifactWriter(Folder.at(tmp_path / stage / "f"))
        for name, table in tables.items():
            writer.write_table(name, table)
        writer.commit(stage=stage, fingerprint="f", inputs={}, config={}, metrics={}, seconds=0)
    record = {"run": "one", "stages": {"consensus": "f", "assign": "f"}, "config": {}, "result": None}
    Folder.at(tmp_path / "runs").write_bytes("one.json", json.dumps(record).encode())
    return tmp_path


def test_the_most_confused_clusters_are_merged_first(output: Path) -> None:
    assert cut_hierarchy(output, 4).tolist() == [0, 1, 2, 3]
    assert cut_hierarchy(output, 3).tolist() == [0, 1, 0, 2]
    assert cut_hierarchy(output / "runs" / "one.json", 2).tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match="5"):
        cut_hierarchy(output, 5)


def test_every_image_is_written_with_its_group(output: Path) -> None:
    assert write_cut(output, 2, output / "groups.parquet") == 6
    table = pq.read_table(output / "groups.parquet")
    assert table.schema == SCHEMA
    assert table["uri"].to_pylist() == list("abcdef")
    assert table["cluster"].to_pylist() == CLUSTERS.tolist()
    assert table["group"].to_pylist() == [0, 1, 0, 1, -1, 1]


def test_a_place_that_cannot_be_written_and_a_run_that_is_not_there_are_named(output: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/groups\.parquet: cannot be written to"):
        write_cut(output, 2, output / "nowhere" / "groups.parquet")
    with pytest.raises(InputError, match="there is no such run"):
        cut_hierarchy(output / "other", 2)
