"""Which clusters recur, and what is split off: made-up clusterings of the same images."""

from __future__ import annotations

import numpy as np
import pytest

from icce_ray.count.small_groups import kept_share, recurring_share


def labelled(*sizes: int) -> np.ndarray:
    """Images in clusters of these sizes, one after the other."""
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


def test_a_cluster_recurs_whatever_its_size_and_number() -> None:
    # The large group is cut at 50, 20 and 80 of 100 images; the groups of 10 and 5 come again under other numbers.
    parts = [labelled(50, 50, 10, 5), labelled(20, 80, 10, 5), labelled(80, 20, 10, 5)]
    parts[1] = np.array([1, 2, 3, 0], np.int32)[parts[1]]
    np.testing.assert_array_equal(recurring_share(parts, 4), [0.5, 0.5, 0.5])


@pytest.mark.parametrize(("shared", "expected"), [(14, 0), (15, 1)])
def test_clusters_are_the_same_from_three_quarters_on(shared: int, expected: float) -> None:
    parts = [labelled(20), labelled(shared, 20 - shared)]
    assert recurring_share(parts, 2)[0] == expected / 2


def test_one_part_of_many_may_miss_a_cluster_and_half_of_them_may_not() -> None:
    whole, mixed = labelled(20, 20), np.tile(np.arange(4, dtype=np.int32), 10)
    assert recurring_share([whole] * 3 + [mixed], 4).tolist() == [0.5, 0.5, 0.5, 0]
    assert recurring_share([whole] * 2 + [mixed] * 2, 4).tolist() == [0, 0, 0, 0]


def test_only_images_of_both_parts_are_compared() -> None:
    one, other = labelled(20, 20), labelled(20, 20)
    one[:8] = other[20:28] = -1
    assert recurring_share([one, other], 2).tolist() == [1, 1]


def test_clusters_of_four_images_and_empty_ones_do_not_recur() -> None:
    assert recurring_share([labelled(20, 5, 4)] * 2, 5).tolist() == [0.4, 0.4]
    left_out = labelled(20, 5)
    left_out[-1] = -1
    assert recurring_share([left_out] * 2, 2).tolist() == [0.5, 0.5]


def test_images_in_the_largest_piece_of_their_cluster_are_kept() -> None:
    coarse, fine = labelled(60, 40), labelled(50, 10, 20, 15, 5)
    assert kept_share([coarse], [fine]) == pytest.approx(0.7)
    assert kept_share([coarse], [coarse[::-1].max() - coarse]) == 1.0
    left_out = coarse.copy()
    left_out[:50] = -1
    # 30 of 50 images; and the median of three parts.
    assert kept_share([left_out], [np.where(left_out < 0, -1, fine)]) == pytest.approx(0.6)
    assert kept_share([coarse] * 3, [coarse, fine, labelled(30, 30, 40)]) == pytest.approx(0.7)
