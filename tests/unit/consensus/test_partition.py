from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import scipy.sparse as sp

from icce_ray.consensus import partition
from icce_ray.consensus.partition import PartitionError, partition_graph
from icce_ray.errors import WorkerError


@pytest.fixture
def two_cliques() -> sp.csr_array:
    """Two times ten vertices, all joined within, one light edge between."""
    weights = np.kron(np.eye(2, dtype=np.int32), np.full((10, 10), 50, dtype=np.int32))
    np.fill_diagonal(weights, 0)
    weights[0, 10] = weights[10, 0] = 1
    return sp.csr_array(weights)


def cut_weight(graph, parts):
    rows, columns = graph.tocoo().coords
    return graph.tocoo().data[parts[rows] != parts[columns]].sum() / 2


def test_the_light_edge_is_cut_for_every_seed_and_the_answer_is_repeatable(two_cliques):
    parts = partition_graph(two_cliques, 2, seeds=[1, 2, 3])
    assert parts.shape == (3, 20)
    assert [cut_weight(two_cliques, row) for row in parts] == [1, 1, 1]
    np.testing.assert_array_equal(parts, partition_graph(two_cliques, 2, seeds=[1, 2, 3]))


def test_parts_are_balanced_by_weight_not_by_number_of_vertices():
    ring = sp.csr_array(
        np.roll(np.eye(40, dtype=np.int32), 1, axis=0) + np.roll(np.eye(40, dtype=np.int32), -1, axis=0)
    )
    weights = np.ones(40, dtype=np.int64)
    weights[0] = 35
    even = partition_graph(ring, 2, imbalance=1.1, seeds=[0])[0]
    weighted = partition_graph(ring, 2, vertex_weights=weights, imbalance=1.1, seeds=[0])[0]
    assert np.bincount(even, minlength=2).max() <= 22
    assert np.count_nonzero(weighted == weighted[0]) < 10


def test_nothing_is_written_into_the_working_directory(two_cliques, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    partition_graph(two_cliques, 2, seeds=[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_parts", [1, 21])
def test_impossible_numbers_of_parts_are_refused(two_cliques, num_parts):
    with pytest.raises(PartitionError, match="20 vertices"):
        partition_graph(two_cliques, num_parts, seeds=[0])


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.abort()", "exit code -6"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
        ("raise MemoryError('no room')", "MemoryError: no room"),
        ("print('nonsense')", "something other"),
        ("import time; time.sleep(60)", "timed out"),
    ],
)
def test_a_fault_of_the_partitioner_is_tried_again_and_then_ends_the_run(two_cliques, monkeypatch, program, message):
    run, tries = partition.subprocess.run, []
    monkeypatch.setattr(
        partition.subprocess, "run", lambda *args, **options: (tries.append(1), run(*args, **options))[1]
    )
    monkeypatch.setattr(partition, "COMMAND", [sys.executable, "-c", program])
    monkeypatch.setattr(partition, "TIMEOUT_S", 0.1 if "sleep" in program else 60)
    with pytest.raises(WorkerError, match=f"consensus: METIS failed 3 times: .*{message}"):
        partition_graph(two_cliques, 2, seeds=[0])
    assert len(tries) == 3


def test_a_partitioner_that_is_killed_once_changes_nothing(two_cliques, monkeypatch, tmp_path):
    expected = partition_graph(two_cliques, 2, seeds=[1, 2])
    died = tmp_path / "died"
    program = f"import os; os.path.exists({str(died)!r}) or (open({str(died)!r}, 'w'), os.kill(os.getpid(), 9)); "
    program += "from icce_ray.consensus.partition import _main; _main()"
    monkeypatch.setattr(partition, "COMMAND", [sys.executable, "-c", program])
    np.testing.assert_array_equal(partition_graph(two_cliques, 2, seeds=[1, 2]), expected)
    assert died.exists()


def test_a_graph_that_the_partitioner_refuses_is_not_applicable(two_cliques, monkeypatch):
    monkeypatch.setattr(partition, "COMMAND", [sys.executable, "-c", "import sys; sys.exit('METIS: no such graph')"])
    with pytest.raises(PartitionError, match="METIS: no such graph"):
        partition_graph(two_cliques, 2, seeds=[0])


def test_the_partitioner_sees_the_modules_of_its_parent(two_cliques, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    assert partition_graph(two_cliques, 2, seeds=[0]).shape == (1, 20)
