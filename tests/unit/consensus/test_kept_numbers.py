from __future__ import annotations

import numpy as np
import pytest

from icce_ray.consensus.hierarchy import merge_clusters
from icce_ray.consensus.kept_numbers import number_clusters


def labels(*sizes: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(label before, label now, number of images) of each group."""
    before, now, count = np.array(sizes).T
    return np.repeat(before, count), np.repeat(now, count)


def test_clusters_that_persist_keep_their_numbers_whatever_they_are_called_now() -> None:
    rng = np.random.default_rng(0)
    for num_clusters in (2, 7, 30):
        before = rng.integers(0, num_clusters, 5000)
        names = rng.permutation(num_clusters)
        now = np.where(rng.random(5000) < 0.1, rng.integers(0, num_clusters, 5000), names[before])
        sizes = np.bincount(now, minlength=num_clusters)
        number, changes = number_clusters(before, now, num_clusters, sizes)
        assert number[names].tolist() == list(range(num_clusters))
        assert changes == {
            "num_kept": num_clusters, "new": [], "split": [], "merged": [], "gone": [], "renumbered": []
        }  # fmt: skip


def test_new_split_merged_and_gone_clusters_are_told_apart() -> None:
    before, now = labels(
        (0, 4, 50), (1, 4, 40), (2, 0, 30), (2, 1, 20), (3, 2, 12), (3, 1, 10), (3, 4, 11), (4, 3, 60),
        (-1, 3, 9), (0, -1, 2),
    )  # fmt: skip
    sizes = np.bincount(now[now >= 0], minlength=6)
    sizes[5] = 70  # all of them new images, of which three were known
    before, now = np.append(before, [4, 4, 4]), np.append(now, [5, 5, 5])
    number, changes = number_clusters(before, now, 5, sizes)
    # Those without a match are 1, 2 and 5; free are 5, which no cluster had, then 1 and 3, which are gone.
    assert number.tolist() == [2, 5, 1, 4, 0, 3]
    assert changes["num_kept"] == 3
    assert changes["split"] == [[1, 3], [5, 2]]
    assert changes["new"] == [3]
    assert changes["merged"] == [[1, 0]]
    assert changes["gone"] == [3]


def test_with_fewer_clusters_a_number_that_is_too_large_changes() -> None:
    before, now = labels((0, 1, 9), (1, 1, 5), (2, 0, 9))
    number, changes = number_clusters(before, now, 4, np.array([9, 14]))  # no image of the last one is known
    assert number.tolist() == [1, 0]
    assert changes["renumbered"] == [[2, 1]]
    assert changes["merged"] == [[1, 0]]
    assert changes["gone"] == []
    assert changes["num_kept"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_renumbered_hierarchy_makes_the_same_groups(seed: int) -> None:
    rng = np.random.default_rng(seed)
    hierarchy = merge_clusters(rng.random((9, 9)), rng.integers(1, 50, 9))
    number = rng.permutation(9).astype(np.int32)
    renumbered = hierarchy.renumbered(number)
    for num_groups in range(1, 10):
        groups, expected = renumbered.cut(num_groups)[number], hierarchy.cut(num_groups)
        assert len(set(zip(groups, expected, strict=True))) == num_groups
    lowest = list(range(17))
    for step, (left, right) in enumerate(zip(renumbered.left, renumbered.right, strict=True)):
        assert lowest[left] < lowest[right]
        lowest[9 + step] = lowest[left]
