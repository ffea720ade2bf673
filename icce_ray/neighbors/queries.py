"""The images whose neighbours are searched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from icce_ray.neighbors.adaptive_rule import Rule
from icce_ray.sample.unit_features import Floats, Ids, UnitFeatures, exact_similarity

UNREACHABLE = 2.0
"""A radius that no score reaches; every score reaches -2."""


@dataclass(frozen=True)
class Queries:
    """Q images whose neighbours are wanted, by their rows in the features of all images."""

    unit: UnitFeatures
    ids_Q: Ids

    def __len__(self) -> int:
        return len(self.ids_Q)

    @cached_property
    def features(self) -> Floats:
        """(Q, D). Prepared on first use, since most answers are merged without it."""
        return self.unit[self.ids_Q]

    def unsearched(self, rule: Rule, error: float) -> npt.NDArray[np.bool_]:
        """(Q,) the zero vectors, if the threshold is above 0: all images are equally far from them, none is near."""
        if rule.threshold is not None and rule.threshold <= error:
            return np.zeros(len(self), bool)
        return np.logical_not(self.features.any(axis=1))

    def exact(self, rows_P: npt.NDArray[np.int32], ids_P: Ids) -> Ids:
        """Cosine of each pair of a query and any image in units of `RESOLUTION`, from float64 products: (P,) int64."""
        return exact_similarity(self.features, rows_P, self.unit, ids_P)


def always_wanted(rule: Rule, error: float) -> float:
    """The score from which on a pair is kept regardless of the rest of its row; `UNREACHABLE` without a threshold."""
    return UNREACHABLE if rule.threshold is None else min(rule.threshold - error, UNREACHABLE)
