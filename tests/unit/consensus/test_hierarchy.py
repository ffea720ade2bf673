from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.consensus.hierarchy import Hierarchy, build_hierarchy, merge_clusters, similarities
from icce_ray.consensus.label_matrix import count_consensus, encode_heads
from icce_ray.errors import InputError
from icce_ray.metrics.true_label_scores import clustering_accuracy


def coassociation(heads_HN: np.ndarray) -> np.ndarray:
    """(N, N): the share of heads that put two images together."""
    return np.mean([head_N[:, None] == head_N[None, :] for head_N in heads_HN], axis=0)


def reference(labels_N: np.ndarray, heads_HN: np.ndarray) -> list[tuple[int, int, float]]:
    """Average linkage on the N x N co-association, started from the clusters: (id, id, similarity) of each merge."""
    together_NN = coassociation(heads_HN)
    num_clusters = int(labels_N.max()) + 1
    members = {cluster: np.flatnonzero(labels_N == cluster) for cluster in range(num_clusters)}
    merges = []
    for step in range(num_clusters - 1):
        pairs = [(a, b) for a in members for b in members if a < b]
        one, other = max(pairs, key=lambda pair: together_NN[np.ix_(members[pair[0]], members[pair[1]])].mean())
        merges.append((one, other, together_NN[np.ix_(members[one], members[other])].mean()))
        members[num_clusters + step] = np.concatenate([members.pop(one), members.pop(other)])
    return merges


def noisy_heads(num_clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of unequal size, and heads that confuse neighbouring ones most."""
    rng = np.random.default_rng(seed)
    labels_N = rng.choice(num_clusters, 300, p=rng.dirichlet(np.full(num_clusters, 3.0)))
    labels_N[:num_clusters] = np.arange(num_clusters)
    shift = np.rint(rng.normal(0, 1.0, (6, 300))).astype(int)
    return labels_N, np.clip(labels_N + shift, 0, num_clusters - 1)


@pytest.mark.parametrize("seed", range(5))
def test_the_tree_is_average_linkage_of_the_images_of_the_clusters(seed: int) -> None:
    labels_N, heads_HN = noisy_heads(9, seed)
    heads = encode_heads(heads_HN)
    tree = build_hierarchy(count_consensus(labels_N, heads, 9), heads.offsets)
    expected = reference(labels_N, heads_HN)
    assert [{one, other} for one, other, _ in expected] == [
        set(pair) for pair in zip(tree.left, tree.right, strict=True)
    ]
    np.testing.assert_allclose(tree.similarity, [similarity for _, _, similarity in expected], atol=1e-12)
    assert tree.size[-1] == 300


def test_with_clusters_of_one_image_it_is_scipys_average_linkage() -> None:
    rng = np.random.default_rng(0)
    similarity = rng.random((12, 12))
    similarity = (similarity + similarity.T) / 2
    distance = squareform(1 - similarity, checks=False)
    tree = merge_clusters(similarity, np.ones(12, dtype=np.int64))
    scipys = linkage(distance, "average")
    np.testing.assert_allclose(1 - tree.similarity, scipys[:, 2])
    for num_groups in range(1, 13):
        groups = fcluster(scipys, num_groups, "maxclust")
        assert clustering_accuracy(groups, tree.cut(num_groups)) == 1.0


def test_counts_of_parts_add_up_to_the_same_tree() -> None:
    labels_N, heads_HN = noisy_heads(7, 3)
    heads = encode_heads(heads_HN)
    whole = build_hierarchy(count_consensus(labels_N, heads, 7), heads.offsets)
    parts = [
        count_consensus(labels_N[part], heads.read(part.start, part.stop), 7) for part in (slice(0, 90), slice(90, 300))
    ]
    assert build_hierarchy(parts[0] + parts[1], heads.offsets).to_table() == whole.to_table()


def test_images_that_some_heads_leave_out_count() -> None:
    labels_N, heads_HN = noisy_heads(7, 3)
    heads_HN[1, ::3] = -1
    heads = encode_heads(heads_HN)
    assert build_hierarchy(count_consensus(labels_N, heads, 7), heads.offsets).size[-1] == 300


def test_a_planted_hierarchy_is_found_and_cut_anywhere(planted) -> None:
    fine_N, _ = planted([40] * 12, 1, 0.0)
    rng = np.random.default_rng(1)
    # Heads see three groups of four clusters; within a group they mix half of the images up.
    mixed = rng.random((8, len(fine_N))) < 0.5
    heads_HN = np.where(mixed, fine_N // 4 * 4 + rng.integers(0, 4, mixed.shape), fine_N)
    result = cluster_ensemble(heads_HN, 12, methods="vote", random_state=0)
    tree = result.hierarchy
    assert clustering_accuracy(fine_N // 4, tree.cut(3)[result.labels]) == 1.0
    assert (np.diff(tree.similarity) <= 0).all()
    assert tree.similarity[-2] < tree.similarity[-3] / 5, "the groups are told apart"
    for num_groups in range(1, 13):
        groups = tree.cut(num_groups)
        assert set(groups) == set(range(num_groups))
        coarser = tree.cut(max(1, num_groups - 1))
        assert len(set(zip(groups, coarser, strict=True))) == num_groups, "a coarser cut merges whole groups"


def test_equal_similarities_are_merged_from_the_lowest_cluster_on_and_empty_clusters_last() -> None:
    counts = np.zeros((5, 4), dtype=np.int64)
    counts[[0, 1, 3, 4], [0, 0, 2, 2]] = [5, 6, 7, 8]  # cluster 2 is empty
    tree = build_hierarchy(counts, np.array([0, 4]))
    merges = list(zip(tree.left.tolist(), tree.right.tolist(), tree.similarity.tolist(), strict=True))
    assert merges == [(0, 1, 1.0), (3, 4, 1.0), (5, 2, 0.0), (7, 6, 0.0)]
    assert tree.size.tolist() == [11, 15, 11, 26]


def test_a_missing_label_counts_for_no_head_cluster() -> None:
    heads = encode_heads(np.array([[0, 0, 1, -1], [0, 0, 1, 1]]))
    similarity = similarities(count_consensus(np.array([0, 0, 1, 1]), heads, 2), heads.offsets)
    np.testing.assert_array_equal(similarity, np.eye(2))


def test_a_tree_survives_the_way_through_a_table(tmp_path: Path) -> None:
    labels_N, heads_HN = noisy_heads(6, 0)
    heads = encode_heads(heads_HN)
    tree = build_hierarchy(count_consensus(labels_N, heads, 6), heads.offsets)
    table = tree.to_table()
    assert table.column_names == ["step", "left", "right", "merged", "similarity", "size"]
    assert table["merged"].to_pylist() == [6, 7, 8, 9, 10]
    assert Hierarchy.from_table(table).to_table() == table


@pytest.mark.parametrize("num_groups", [0, -1, 7])
def test_a_cut_that_cannot_be_is_refused_with_what_can(num_groups: int) -> None:
    tree = merge_clusters(np.eye(6), np.ones(6, dtype=np.int64))
    with pytest.raises(InputError, match=f"{num_groups} groups asked for; the hierarchy has 6 clusters.*from 1 to 6"):
        tree.cut(num_groups)
