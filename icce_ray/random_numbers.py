"""Random numbers without a state: a hash of numbers instead of a generator, so that the order of draws doesn't matter.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

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
