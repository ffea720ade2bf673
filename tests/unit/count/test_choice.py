"""Which numbers of clusters are tried, and which is chosen: the maths on made-up measurements."""

from __future__ import annotations

import numpy as np
import pytest

from icce_ray.count.choice import Choice, Measured, choose

NOISE = np.array([-0.01, 0.0, 0.01])


def measured(number: int, silhouette: float, gap: float, noise: float = 1.0, recurring: float = 0.0) -> Measured:
    return Measured(number, silhouette + noise * NOISE, gap + 0 * NOISE, recurring + 10 * NOISE)


def curve(
    values: dict[int, tuple[float, float]],
    noise: float = 0.0,
    recurring: dict[int, float] | None = None,
    kept: dict[tuple[int, int], float] | None = None,
) -> Choice:
    """The choice from silhouettes and gaps. `recurring`: shares of clusters by number. `kept`: shares of images from
    one number to another. Others are 0."""
    shares, numbers = recurring or {}, sorted(values)
    return choose(
        [measured(number, *values[number], noise, shares.get(number, 0.0)) for number in numbers],
        lambda coarse, fine: (kept or {}).get((numbers[coarse], numbers[fine]), 0.0),
    )


def test_a_range_of_one_number_is_that_number() -> None:
    choice = curve({5: (0.5, 0.1)})
    assert (choice.num_clusters, choice.low, choice.high) == (5, 5, 5)


def test_a_clear_gap_decides_and_a_small_one_leaves_it_to_the_silhouette() -> None:
    silhouettes = {3: 0.2, 5: 0.16, 8: 0.0}
    clear = curve({number: (value, 0.3 if number == 5 else 0.02) for number, value in silhouettes.items()})
    small = curve({number: (value, 0.03 if number == 8 else 0.01) for number, value in silhouettes.items()})
    # The range is that of the silhouette, and the choice belongs to it.
    assert (clear.low, clear.num_clusters, clear.high) == (3, 5, 5)
    assert (small.low, small.num_clusters, small.high) == (3, 3, 3)
    # A gap of 0.02 more counts a quarter of what the best silhouette does.
    assert small.scores.mean(axis=1) == pytest.approx([0.5, 0.4, 0.125])


@pytest.mark.parametrize(
    ("gap", "silhouette", "expected"), [(0.02, 0.97, (2, 5, 6)), (0.09, 0.97, (2, 2, 6)), (0.02, 0.5, (2, 2, 2))]
)
def test_two_clusters_need_a_clear_gap_or_a_range_without_finer_numbers(gap, silhouette, expected) -> None:
    values = {2: (1.0, gap), 5: (silhouette, 0.01), 6: (silhouette - 0.01, 0.01), 30: (0.0, 0.0)}
    choice = curve(values, noise=1.0)
    assert (choice.low, choice.num_clusters, choice.high) == expected


@pytest.mark.parametrize(
    ("recurring", "kept", "expected"),
    [
        (
            {5: 1.0, 12: 0.9},
            {(3, 5): 1.0, (3, 12): 0.9, (12, 5): 1.0},
            (3, 12, 12),
        ),  # the largest, however low its silhouette
        ({5: 0.9, 12: 0.89}, {(3, 5): 1.0, (3, 12): 1.0}, (3, 5, 5)),
        ({5: 1.0, 12: 1.0}, {(3, 5): 0.9, (3, 12): 0.89, (5, 12): 1.0}, (3, 5, 5)),  # large clusters are split
        ({2: 1.0}, {(3, 2): 1.0}, (3, 3, 4)),
        ({4: 1.0}, {(3, 4): 1.0}, (3, 4, 4)),
    ],
)
def test_a_number_beyond_the_range_whose_clusters_recur_is_chosen_if_it_splits_small_groups_off(
    recurring, kept, expected
) -> None:
    values = {2: (0.1, 0.0), 3: (0.5, 0.3), 4: (0.49, 0.0), 5: (0.2, 0.0), 6: (0.1, 0.0), 12: (0.0, 0.0)}
    choice = curve(values, noise=1.0, recurring=recurring, kept=kept)
    assert (choice.low, choice.num_clusters, choice.high) == expected


def test_within_the_range_small_groups_are_split_off_a_coarse_choice_only() -> None:
    for chosen, expected in ((3, (3, 5, 6)), (4, (4, 4, 6))):
        values = {2: (0.1, 0.0), chosen: (0.5, 0.3), 5: (0.49, 0.0), 6: (0.49, 0.0), 12: (0.1, 0.0), 20: (0.0, 0.0)}
        choice = curve(values, noise=1.0, recurring={5: 1.0}, kept={(chosen, 5): 1.0})
        assert (choice.low, choice.num_clusters, choice.high) == expected


def test_small_groups_are_split_off_what_is_chosen_in_place_of_a_doubtful_two() -> None:
    values = {2: (1.0, 0.02), 5: (0.97, 0.01), 6: (0.96, 0.01), 8: (0.0, 0.0), 30: (0.0, 0.0)}
    assert curve(values, noise=1.0).num_clusters == 5
    assert curve(values, noise=1.0, recurring={8: 1.0}, kept={(5, 8): 1.0}).num_clusters == 8
    assert curve(values, noise=1.0, recurring={8: 1.0}, kept={(2, 8): 1.0}).num_clusters == 5


def test_the_range_goes_as_far_as_the_images_leave_it_open() -> None:
    height = {2: 0.96, 4: 0.1, 6: 0.2, 8: 0.985, 10: 1.0, 13: 0.97, 20: 0.5, 30: 0.4}
    values = {number: (value, 0.5 * value) for number, value in height.items()}
    # The silhouette's deviation is 0.011 of its range; times sqrt(2 * 9), a standard error is 0.047.
    choice = curve(values, noise=0.3)
    assert (choice.low, choice.num_clusters, choice.high) == (10, 10, 10)
    assert "no number beside it is as good" in choice.sentence()
    choice = curve(values, noise=0.5)
    assert (choice.low, choice.num_clusters, choice.high) == (8, 10, 10)
    # One number that falls out of line does not end it; two, 4 and 6, do.
    choice = curve(values, noise=1.0)
    assert (choice.low, choice.num_clusters, choice.high) == (8, 10, 13)
    assert "8 to 13 are as good within the spread of images" in choice.sentence()
    values[9] = (0.8, 0.4)
    assert curve(values, noise=1.0).low == 8


def test_what_cannot_be_told_counts_as_the_worst() -> None:
    for shift in (0.0, -0.5):  # a silhouette may be negative
        choice = curve({2: (np.nan, 0.1), 3: (0.3 + shift, 0.2), 4: (0.2 + shift, np.nan)})
        assert choice.num_clusters == 3
        assert np.isfinite(choice.scores).all()
        assert choice.scores.mean(axis=1).argmax() == 1
    everything = curve(dict.fromkeys((2, 3), (np.nan, np.nan)))
    assert everything.num_clusters == 2


def test_the_choice_does_not_depend_on_the_scale_of_the_silhouette() -> None:
    values = {2: (0.01, 0.1), 4: (0.05, 0.2), 8: (0.04, 0.0), 16: (0.01, 0.1)}
    scaled = {number: (7 * silhouette - 1, gap) for number, (silhouette, gap) in values.items()}
    np.testing.assert_allclose(curve(values).scores, curve(scaled).scores, atol=1e-12)


def test_the_tables_hold_means_and_intervals_and_mark_the_choice() -> None:
    choice = curve({4: (0.1, 0.1), 8: (0.3, 0.2), 16: (0.2, 0.1)}, noise=1.0)
    rows = {row["num_clusters"]: row for row in choice.by_count().to_pylist()}
    assert [number for number, row in rows.items() if row["chosen"]] == [8]
    assert rows[8]["silhouette"] == pytest.approx(0.3)
    assert rows[8]["silhouette_std"] == pytest.approx(0.01)
    assert rows[8]["silhouette_high"] - rows[8]["silhouette"] == pytest.approx(2 * 0.01 / 3**0.5)
    assert rows[8]["score"] == pytest.approx(1.0)
    assert rows[8]["recurring"] == pytest.approx(0.0)
    assert rows[8]["recurring_std"] == pytest.approx(0.1)
    seeds = choice.by_seed().to_pylist()
    assert len(seeds) == 9
    assert seeds[0]["silhouette"] == pytest.approx(0.09)
    assert "8 clusters were chosen, tried 4 to 16" in choice.sentence()


def test_a_best_at_the_end_of_the_range_is_said() -> None:
    assert "widen it" in curve({4: (0.1, 0.1), 8: (0.3, 0.2)}).sentence()
    assert "widen it" not in curve({4: (0.1, 0.1), 8: (0.3, 0.2), 16: (0.2, 0.1)}).sentence()
