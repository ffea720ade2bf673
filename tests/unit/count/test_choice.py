"""Which numbers of clusters are tried, and which is chosen: the maths on made-up measurements."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icce_ray.count.choice import Choice, Measured, between, choose, coarse_grid, search

NOISE = np.array([-0.01, 0.0, 0.01])


def measured(number: int, stability: float, silhouette: float, noise: float = 1.0) -> Measured:
    return Measured(
        num_clusters=number,
        seeds=(0, 1, 2),
        num_clusters_used=np.full(3, number),
        stability=stability + noise * NOISE,
        generalization=1 / number + 0 * NOISE,
        silhouette=silhouette - noise * NOISE[[2, 0, 1]],
    )


def peak(number: int, at: int) -> Measured:
    """Both measures fall with the distance (of logarithms) from `at`."""
    height = float(np.exp(-(np.log(number / at) ** 2)))
    return measured(number, height, height)


def curve(values: dict[int, tuple[float, float]], noise: float = 0.0) -> Choice:
    return choose({number: measured(number, *both, noise) for number, both in values.items()})


@given(st.integers(2, 200), st.integers(0, 2000))
def test_the_coarse_grid_has_both_ends_and_rising_steps(low: int, more: int) -> None:
    grid = coarse_grid(low, low + more)
    assert (grid[0], grid[-1]) == (low, low + more)
    assert grid == sorted(set(grid))
    assert all(upper <= 1.5 * lower + 1 for lower, upper in itertools.pairwise(grid))


@pytest.mark.parametrize("at", [2, 3, 7, 20, 60, 61, 99, 100])
def test_the_search_ends_within_five_percent_or_one_of_the_peak(at: int) -> None:
    asked: list[int] = []

    def measure(numbers: Sequence[int]) -> Iterator[Measured]:
        asked.extend(numbers)
        for number in numbers:
            yield peak(number, at)

    choice = search(2, 100, measure)
    assert abs(choice.num_clusters - at) <= max(1, 0.05 * at)
    assert len(asked) == len(set(asked)), "nothing is measured twice"
    assert len(asked) <= 24
    tried = [point.num_clusters for point in choice.curve]
    assert tried == sorted(asked)
    place = tried.index(choice.num_clusters)
    for lower, upper in zip(tried[max(0, place - 1) : place + 1], tried[place : place + 2], strict=False):
        assert upper <= max(1.05 * lower, lower + 1)


def test_a_range_of_one_number_is_that_number() -> None:
    choice = search(5, 5, lambda numbers: [peak(number, 9) for number in numbers])
    assert (choice.num_clusters, choice.low, choice.high) == (5, 5, 5)


def test_between_asks_for_what_lies_on_both_sides_until_the_steps_are_fine() -> None:
    assert between([10, 20, 40], 20) == [14, 28]
    assert between([10, 20, 40], 10) == [14]
    assert between([4, 5, 6], 5) == []
    assert between([4, 6], 4) == [5]
    assert between([58, 60, 63], 60) == []
    assert between([58, 60, 66], 60) == [63]


def test_stable_but_shapeless_and_shapely_but_unstable_numbers_lose_to_what_is_both() -> None:
    # Two halves of anything are found again by every seed; a little above the truth stability lasts longest.
    choice = curve({2: (0.9, 0.05), 5: (0.5, 0.12), 10: (0.88, 0.20), 12: (0.92, 0.11), 30: (0.2, 0.02)})
    assert choice.num_clusters == 10


def test_the_range_goes_as_far_as_the_seeds_leave_it_open() -> None:
    height = {2: 0.96, 4: 0.1, 6: 0.2, 8: 0.985, 10: 1.0, 13: 0.97, 20: 0.5, 30: 0.4}
    values = {number: (value, value) for number, value in height.items()}
    # The score's deviation is 0.0096 of its range, two standard errors of a difference of means of three are 0.0157.
    choice = curve(values, noise=1.0)
    assert (choice.low, choice.num_clusters, choice.high) == (10, 10, 10)
    assert "no number beside it is as good" in choice.sentence()
    choice = curve(values, noise=1.5)
    assert (choice.low, choice.num_clusters, choice.high) == (8, 10, 10)
    # One number that falls out of line does not end it; two, 4 and 6, do.
    choice = curve(values, noise=3.0)
    assert (choice.low, choice.num_clusters, choice.high) == (8, 10, 13)
    assert "8 to 13 are as good within the spread of seeds" in choice.sentence()
    values[9] = (0.8, 0.8)
    assert curve(values, noise=3.0).low == 8


def test_what_cannot_be_told_counts_as_the_worst() -> None:
    choice = curve({2: (0.5, np.nan), 3: (0.6, 0.3), 4: (0.5, 0.2)})
    assert choice.num_clusters == 3
    assert np.isfinite(choice.scores).all()
    everything = curve({2: (np.nan, np.nan), 3: (np.nan, np.nan)})
    assert everything.num_clusters == 2


def test_the_choice_does_not_depend_on_the_scale_of_a_metric() -> None:
    values = {2: (0.3, 0.01), 4: (0.7, 0.05), 8: (0.9, 0.04), 16: (0.5, 0.01)}
    scaled = {number: (stability, 7 * silhouette - 1) for number, (stability, silhouette) in values.items()}
    np.testing.assert_allclose(curve(values).scores, curve(scaled).scores, atol=1e-12)


def test_the_tables_hold_means_and_intervals_and_mark_the_choice() -> None:
    choice = curve({4: (0.5, 0.1), 8: (0.9, 0.3), 16: (0.4, 0.2)}, noise=1.0)
    rows = {row["num_clusters"]: row for row in choice.by_count().to_pylist()}
    assert [number for number, row in rows.items() if row["chosen"]] == [8]
    assert rows[8]["stability"] == pytest.approx(0.9)
    assert rows[8]["stability_std"] == pytest.approx(0.01)
    assert rows[8]["stability_high"] - rows[8]["stability"] == pytest.approx(2 * 0.01 / 3**0.5)
    assert rows[8]["score"] == pytest.approx(1.0)
    seeds = choice.by_seed().to_pylist()
    assert len(seeds) == 9
    assert seeds[0]["stability"] == pytest.approx(0.49)
    assert "8 clusters were chosen, tried 4 to 16" in choice.sentence()


def test_a_best_at_the_end_of_the_range_is_said() -> None:
    assert "widen it" in curve({4: (0.5, 0.1), 8: (0.9, 0.3)}).sentence()
    assert "widen it" not in curve({4: (0.5, 0.1), 8: (0.9, 0.3), 16: (0.4, 0.2)}).sentence()
