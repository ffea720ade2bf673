from __future__ import annotations

import numpy as np

from icce_ray.random_numbers import GOLDEN_GAMMA, splitmix64


def test_the_numbers_are_those_of_the_reference_implementation() -> None:
    # The first outputs of Vigna's splitmix64.c, and of Java's SplittableRandom, seeded with 1234567.
    states = np.uint64(1234567) + np.arange(5, dtype=np.uint64) * GOLDEN_GAMMA
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
