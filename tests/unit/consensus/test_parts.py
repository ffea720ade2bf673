"""The consensus of a matrix in parts, on storage, or of several runs is that of the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest

from icce_ray.config import ConsensusConfig
from icce_ray.consensus import best_consensus, consensus_memory, label_matrix
from icce_ray.consensus.consensus_memory import check_memory, coordinator_bytes, worker_bytes
from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.consensus.graph_cuts import compare_heads
from icce_ray.consensus.label_matrix import count_consensus, encode_heads
from icce_ray.consensus.stored_label_matrix import open_heads
from icce_ray.errors import InputError, ResourceError
from icce_ray.metrics.true_label_scores import clustering_accuracy
from icce_ray.store import ArtifactWriter, Folder

ARRAYS = ("labels", "agreement", "vote_entropy", "second_choice")


def store(folder, matrix):
    writer = ArtifactWriter(Folder.at(folder))
    writer.write_array("label_matrix.npy", matrix)
    return writer.commit(stage="heads", fingerprint="f", inputs={}, config={}, metrics={}, seconds=0.0)


@pytest.fixture
def unlike_heads(planted):
    """Heads of 4, 2 and 9 clusters, with missing labels and gaps in the numbers."""
    _, matrix = planted([80, 50, 40, 10], 6, 0.3)
    matrix[1] = np.minimum(matrix[1], 1)
    matrix[2] = matrix[2] * 1000 + np.arange(180) % 2
    matrix[3:, ::7] = -1
    return matrix


@pytest.mark.parametrize(("num_clusters", "part_labels"), [(4, 40), (40, 200)])
def test_the_consensus_does_not_depend_on_the_parts(unlike_heads, num_clusters, part_labels, monkeypatch):
    monkeypatch.setattr(best_consensus, "TRIES_BUDGET", 1)
    whole = cluster_ensemble(unlike_heads, num_clusters, methods=["mcla", "hbgf", "vote"], random_state=0)
    monkeypatch.setattr(label_matrix, "PART_LABELS", part_labels)
    parts = cluster_ensemble(unlike_heads, num_clusters, methods=["mcla", "hbgf", "vote"], random_state=0)
    assert whole.anmi == parts.anmi
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_pairs_of_heads_do_not_depend_on_the_parts_nor_on_how_tables_are_kept(unlike_heads, monkeypatch):
    heads = encode_heads(unlike_heads)
    whole = compare_heads(heads)
    monkeypatch.setattr(label_matrix, "PART_LABELS", 50)
    monkeypatch.setattr("icce_ray.metrics.contingency.MIN_DENSE_CELLS", 0)
    monkeypatch.setattr("icce_ray.metrics.contingency.MAX_DENSE_CELLS_PER_IMAGE", 0.3)
    monkeypatch.setattr("icce_ray.consensus.graph_cuts.MAX_TILE_HEADS", 2)
    parts = compare_heads(heads)
    np.testing.assert_allclose(whole.nmi_HH, parts.nmi_HH, atol=1e-14)
    np.testing.assert_array_equal(whole.cluster_graph().toarray(), parts.cluster_graph().toarray())


@pytest.mark.parametrize("unlabelled", [[], [0], [179], [0, 9, 10, 11, 50, 51, 170, 179], [*range(100), 102]])
def test_stored_heads_are_read_as_those_in_memory(unlike_heads, tmp_path, monkeypatch, unlabelled):
    monkeypatch.setattr(label_matrix, "PART_LABELS", 150)
    unlike_heads = unlike_heads.copy()
    unlike_heads[:, unlabelled] = -1
    runs = [store(tmp_path / "a", unlike_heads[:3].astype(np.int16)), store(tmp_path / "b", unlike_heads[3:])]
    stored, whole = open_heads(runs), encode_heads(unlike_heads)
    assert stored.num_images == whole.num_images == 180 - len(unlabelled)
    np.testing.assert_array_equal(stored.unlabelled, unlabelled)
    for one, other in zip(stored.values, whole.values, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(stored.gather().codes, whole.codes)
    reads = [(0, 79, 0, 6), (10, 20, 1, 3), (50, 51, 3, 4), (70, 79, 0, 1)]
    reads += [(0, 3, 0, 6), (2, 9, 0, 2), (8, 47, 4, 6)]  # where images without labels lie before the first or last
    for start, stop, first, end in reads:
        np.testing.assert_array_equal(
            stored.read(start, stop, slice(first, end)).codes, whole.codes[first:end, start:stop]
        )
    np.testing.assert_array_equal(stored.head_cluster_sizes(), whole.head_cluster_sizes())
    some, same = stored.select([4, 1]), whole.select([4, 1])
    np.testing.assert_array_equal(some.gather().codes, same.codes)
    np.testing.assert_array_equal(same.codes, whole.codes[[4, 1]])
    assert [values.tolist() for values in some.values] == [values.tolist() for values in same.values]


def test_faults_of_a_stored_matrix_are_named_as_those_of_one_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(label_matrix, "PART_LABELS", 6)
    matrix = np.zeros((2, 10), dtype=np.int32)
    faults = {"head 1 has no label": (1, slice(None), -1), "holds -3": (0, 7, -3)}
    for message, (head, images, label) in faults.items():
        spoilt = matrix.copy()
        spoilt[head, images] = label
        for read in (encode_heads, lambda labels, name=message: open_heads([store(tmp_path / name, labels)])):
            with pytest.raises(InputError, match=message):
                read(spoilt)


def test_runs_of_different_numbers_of_images_are_refused(tmp_path):
    runs = [store(tmp_path / str(n), np.zeros((2, n), dtype=np.int32)) for n in (10, 11)]
    with pytest.raises(InputError, match="10, 11 images"):
        open_heads(runs)


def test_several_runs_with_other_numbers_of_heads_and_clusters_make_one_consensus(planted, tmp_path):
    labels_N, matrix = planted([50, 40, 30], 7, 0.1)
    coarse, fine = np.minimum(matrix[:2], 1).astype(np.int16), matrix[2:]
    together = cluster_ensemble([coarse, fine], 3, methods="mcla", random_state=0)
    rows = np.concatenate([coarse[[0, 1, 0, 1, 0]], fine])
    stacked = cluster_ensemble(rows, 3, methods="mcla", random_state=0)
    np.testing.assert_array_equal(together.labels, stacked.labels)
    stored = open_heads([store(tmp_path / "coarse", coarse), store(tmp_path / "fine", fine)])
    np.testing.assert_array_equal([stored.labels_of(head) for head in range(10)], rows)
    best_head = max(clustering_accuracy(labels_N, row) for row in matrix)
    assert clustering_accuracy(labels_N, together.labels) > max(best_head, 0.9)
    with pytest.raises(InputError, match=r"\(2, 120\), \(5, 100\)"):
        cluster_ensemble([coarse, fine[:, :100]], 3)
    with pytest.raises(InputError, match="float64"):
        cluster_ensemble([coarse, fine.astype(float)], 3)


def test_counts_are_small_integers_and_a_part_is_a_view(planted):
    _, matrix = planted([30, 30], 4, 0.1)
    heads = encode_heads(matrix)
    assert count_consensus(matrix[0], heads, 2).dtype == np.int32
    assert np.shares_memory(heads.read(3, 9).codes, heads.codes)


def test_what_does_not_fit_into_memory_is_refused_with_the_number(planted, monkeypatch):
    _, matrix = planted([30, 30], 4, 0.1)
    heads, methods = encode_heads(matrix), ConsensusConfig().methods
    check_memory(heads, 2, methods)
    needed = coordinator_bytes(60, heads.num_clusters, 2, methods) + 3 * worker_bytes(60, heads.num_clusters, 2)
    monkeypatch.setattr(consensus_memory, "available_memory_bytes", lambda: needed - 1)
    with pytest.raises(ResourceError, match=rf"60 images.*{needed / 1e9:.1f} GB with 3 workers"):
        check_memory(heads, 2, methods, num_workers=3)
    check_memory(heads, 2, methods, num_workers=2)
    monkeypatch.setattr(consensus_memory, "available_memory_bytes", lambda: 0)
    with pytest.raises(ResourceError):
        cluster_ensemble(matrix, 2)
