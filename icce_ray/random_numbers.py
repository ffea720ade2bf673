"""Seeded draws: hashes of numbers, for which the order of draws doesn't matter, and samples of rows.

The hash is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

import numpy as np
import numpy.typing as npt

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(states: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A uniform 64-bit number for each state, an array of any shape. Different states give different numbers."""
    return mix64(states + GOLDEN_GAMMA)


def id_hashes(ids: npt.NDArray[np.integer], seed: int) -> npt.NDArray[np.uint64]:
    """A uniform 64-bit number for each id, (n,) uint64, that depends on the id and the seed only. The images with the
    smallest are a uniform sample, to which a new image is added without redrawing it."""
    return splitmix64(ids.astype(np.uint64) ^ splitmix64(np.array([seed], dtype=np.uint64)))


def mix64(states: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The mixing step alone, for states that were spread by the caller: 0 stays 0."""
    mixed = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def seed_of(*numbers: int) -> int:
    """A seed of 63 bits that depends on these numbers only."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sampled_rows(num_rows: int, max_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """A uniform sample of the numbers 0..num_rows-1, ascending; all of them if there are at most `max_rows`."""
    if num_rows <= max_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, max_rows, replace=False))
