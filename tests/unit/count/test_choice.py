"""Which numbers of clusters are tried, and which is chosen: the maths on made-up measurements."""

from __future__ import annotations

import numpy as np
import pytest

from icce_ray.count.choice import Choice, Measured, choose

NOISE = np.array([-0.01, 0.0, 0.01])


def measured(number: int, stability: float, silhouette: float, gap: float, noise: float = 1.0) -> Measured:
    return Measured(
        num_clusters=number,
        stability=stability + noise * NOISE,
        silhouette=silhouette - noise * NOISE[[2, 0, 1]],
        gap=gap + 0 * NOISE,
    )


def curve(values: dict[int, tuple[float, float, float]], noise: float = 0.0) -> Choice:
    return choose([measured(number, *measures, noise) for number, measures in sorted(values.items())])


def test_a_range_of_one_number_is_that_number() -> None:
    choice = curve({5: (0.5, 0.1, 0.1)})
    assert (choice.num_clusters, choice.low, choice.high) == (5, 5, 5)


def test_stable_but_shapeless_and_shapely_but_unstable_numbers_lose_to_what_is_both() -> None:
    # Two halves of anything are found again by every part; a little above the truth stability lasts longest.
    measures = {2: (0.9, 0.05), 5: (0.5, 0.12), 10: (0.88, 0.20), 12: (0.92, 0.11), 30: (0.2, 0.02)}
    assert curve({number: (*both, 0.01) for number, both in measures.items()}).num_clusters == 10


def test_the_gap_decides_between_numbers_that_are_equally_good() -> None:
    measures = {3: (0.9, 0.2, 0.02), 5: (0.9, 0.19, 0.3), 8: (0.6, 0.1, 0.02)}
    choice = curve(measures, noise=0.1)
    assert choice.num_clusters == 5
    # The range is that of stability and silhouette, and the choice belongs to it.
    assert (choice.low, choice.high) == (3, 5)
    measures[5] = (0.5, 0.12, 0.9)
    measures[8] = (0.5, 0.12, 0.02)
    choice = curve({2: (0.2, 0.05, 0.01), **measures}, noise=0.0)
    assert (choice.low, choice.num_clusters, choice.high) == (3, 3, 3)


def test_the_range_goes_as_far_as_the_images_leave_it_open() -> None:
    height = {2: 0.96, 4: 0.1, 6: 0.2, 8: 0.985, 10: 1.0, 13: 0.97, 20: 0.5, 30: 0.4}
    values = {number: (value, value, 0.5 * value) for number, value in height.items()}
    # The smooth score's deviation is 0.0096 of its range; times sqrt(2 * 9), a standard error is 0.041.
    choice = curve(values, noise=0.3)
    assert (choice.low, choice.num_clusters, choice.high) == (10, 10, 10)
    assert "no number beside it is as good" in choice.sentence()
    choice = curve(values, noise=0.5)
    assert (choice.low, choice.num_clusters, choice.high) == (8, 10, 10)
    # One number that falls out of line does not end it; two, 4 and 6, do.
    choice = curve(values, noise=1.0)
    assert (choice.low, choice.num_clusters, choice.high) == (8, 10, 13)
    assert "8 to 13 are as good within the spread of images" in choice.sentence()
    values[9] = (0.8, 0.8, 0.4)
    assert curve(values, noise=1.0).low == 8


def test_what_cannot_be_told_counts_as_the_worst() -> None:
    choice = curve({2: (0.5, np.nan, 0.1), 3: (0.6, 0.3, 0.2), 4: (0.5, 0.2, np.nan)})
    assert choice.num_clusters == 3
    assert np.isfinite(choice.scores).all()
    everything = curve(dict.fromkeys((2, 3), (np.nan, np.nan, np.nan)))
    assert everything.num_clusters == 2


def test_the_choice_does_not_depend_on_the_scale_of_a_metric() -> None:
    values = {2: (0.3, 0.01, 0.1), 4: (0.7, 0.05, 0.2), 8: (0.9, 0.04, 0.0), 16: (0.5, 0.01, 0.1)}
    scaled = {number: (one, 7 * other - 1, 3 * gap) for number, (one, other, gap) in values.items()}
    np.testing.assert_allclose(curve(values).scores, curve(scaled).scores, atol=1e-12)


def test_the_tables_hold_means_and_intervals_and_mark_the_choice() -> None:
    choice = curve({4: (0.5, 0.1, 0.1), 8: (0.9, 0.3, 0.2), 16: (0.4, 0.2, 0.1)}, noise=1.0)
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
    assert "widen it" in curve({4: (0.5, 0.1, 0.1), 8: (0.9, 0.3, 0.2)}).sentence()
    assert "widen it" not in curve({4: (0.5, 0.1, 0.1), 8: (0.9, 0.3, 0.2), 16: (0.4, 0.2, 0.1)}).sentence()
