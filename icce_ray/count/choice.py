"""How many clusters: which numbers are tried, and which is chosen, from what was measured. Pure maths.

The rule [ours]. Two measures look at each number of clusters K from two sides. *Stability*, the adjusted Rand index of
the heads of different seeds: with too few clusters heads merge what belongs apart, each in its own way, and with too
many they split what belongs together, each in its own way. *Silhouette*, in the space of the principal components: how
much nearer images are to their own cluster than to the next. Stability still holds a little above the true number,
where spare clusters stay small; the silhouette falls at once there, but rises little below it. Each is brought to the
range 0 to 1 over all K, and their mean, the *score*, peaks between. The generalisation score is reported, not used: it
is highest where clusters are few.

The *range* says how sure that is: a number that was tried is as good as the choice when its score is behind by at most
two standard errors of the difference over seeds (about 95%). It runs down and up from the choice to the last such
number before two in a row that are not. It knows the spread of seeds, not that of the images, nor how far the two
measures disagree: the curves show that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

COARSE_RATIO = 2**0.5
FINEST_RATIO = 1.05
METRICS = ("stability", "generalization", "silhouette")
CHOSEN_BY = ("stability", "silhouette")
NUM_ERRORS = 2.0
"""Standard errors to both sides of a mean: an interval of about 95%."""


@dataclass(frozen=True)
class Measured:
    """What was measured with one number of clusters. Arrays have a value per seed; NaN where it cannot be told."""

    num_clusters: int
    seeds: tuple[int, ...]
    num_clusters_used: npt.NDArray[np.int64]
    stability: npt.NDArray[np.float64]
    """Adjusted Rand index, at most 1, about 0 by chance."""
    generalization: npt.NDArray[np.float64]
    """0 to 1."""
    silhouette: npt.NDArray[np.float64]
    """-1 to 1."""


@dataclass(frozen=True)
class Choice:
    """The number of clusters, and how sure that is."""

    num_clusters: int
    low: int
    high: int
    """As good as the choice, by what the seeds tell: from `low` to `high`."""
    curve: tuple[Measured, ...]
    """What was measured, by ascending number of clusters."""
    scores: npt.NDArray[np.float64]
    """Of each point of the curve and each seed, (points, seeds), about 0 to 1."""

    def sentence(self) -> str:
        """The choice and its uncertainty in words."""
        tried = f"tried {self.curve[0].num_clusters} to {self.curve[-1].num_clusters}"
        text = f"{self.num_clusters} clusters were chosen, {tried}"
        if self.low == self.high:
            text += "; no number beside it is as good within the spread of seeds"
        else:
            text += f"; {self.low} to {self.high} are as good within the spread of seeds"
        if self.num_clusters in (self.curve[0].num_clusters, self.curve[-1].num_clusters):
            text += ". The best lies at the end of the range: widen it (cluster_count.min_clusters, max_clusters)"
        return text

    def by_seed(self) -> pa.Table:
        """A row per number of clusters and seed."""
        rows = [
            {
                "num_clusters": point.num_clusters,
                "seed": seed,
                "num_clusters_used": int(point.num_clusters_used[number]),
                **{metric: float(getattr(point, metric)[number]) for metric in METRICS},
                "score": float(scores[number]),
            }
            for point, scores in zip(self.curve, self.scores, strict=True)
            for number, seed in enumerate(point.seeds)
        ]
        return pa.Table.from_pylist(rows)

    def by_count(self) -> pa.Table:
        """A row per number of clusters: of each metric and of the score its mean over seeds, the deviation (`_std`) and
        the interval of two standard errors around the mean (`_low`, `_high`)."""
        rows = []
        for point, scores in zip(self.curve, self.scores, strict=True):
            row: dict[str, Any] = {"num_clusters": point.num_clusters}
            for metric, values in [(metric, getattr(point, metric)) for metric in METRICS] + [("score", scores)]:
                mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
                error = NUM_ERRORS * std / len(values) ** 0.5
                row |= {metric: mean, f"{metric}_std": std}
                row |= {f"{metric}_low": mean - error, f"{metric}_high": mean + error}
            row["chosen"] = point.num_clusters == self.num_clusters
            row["as_good"] = self.low <= point.num_clusters <= self.high
            rows.append(row)
        return pa.Table.from_pylist(rows)


def search(low: int, high: int, measure: Callable[[Sequence[int]], Iterable[Measured]]) -> Choice:
    """From coarse to fine: a geometric grid over low..high, then the geometric means between the best and its
    neighbours, until these are within 5% or 1 of it.

    Args:
        measure: of the numbers given, in any order.
    """
    known: dict[int, Measured] = {}
    wanted = coarse_grid(low, high)
    while wanted:
        known |= {point.num_clusters: point for point in measure(wanted)}
        choice = choose(known)
        wanted = between(sorted(known), choice.num_clusters)
    return choice


def coarse_grid(low: int, high: int) -> list[int]:
    """Both ends, and between them steps of at most about COARSE_RATIO."""
    steps = max(1, math.ceil(math.log(high / low, COARSE_RATIO)))
    return sorted({round(value) for value in np.geomspace(low, high, steps + 1)})


def between(known: Sequence[int], best: int) -> list[int]:
    """What is not known yet halfway from `best` to its neighbours among `known`, ascending."""
    place = known.index(best)
    wanted = []
    for lower, upper in ((place - 1, place), (place, place + 1)):
        if lower < 0 or upper == len(known):
            continue
        if known[upper] > max(known[lower] * FINEST_RATIO, known[lower] + 1):
            middle = round((known[lower] * known[upper]) ** 0.5)
            wanted.append(min(max(middle, known[lower] + 1), known[upper] - 1))
    return wanted


def choose(known: Mapping[int, Measured]) -> Choice:
    """The number with the highest score."""
    curve = tuple(known[number] for number in sorted(known))
    scores_PS = np.mean([_scaled(curve, metric) for metric in CHOSEN_BY], axis=0)
    best = int(scores_PS.mean(axis=1).argmax())
    is_as_good_P = _is_as_good(scores_PS, best)
    first = best - _reach(is_as_good_P[:best][::-1])
    last = best + _reach(is_as_good_P[best + 1 :])
    return Choice(curve[best].num_clusters, curve[first].num_clusters, curve[last].num_clusters, curve, scores_PS)


def _reach(is_as_good: npt.NDArray[np.bool_]) -> int:
    """Steps to the last that is, before two in a row that are not."""
    reached = 0
    for step, good in enumerate(is_as_good, start=1):
        if good:
            reached = step
        elif step > reached + 1:
            break
    return reached


def _is_as_good(scores_PS: npt.NDArray[np.float64], best: int) -> npt.NDArray[np.bool_]:
    """Points (P,) that are not behind the best by more than two standard errors of the difference. The variance over
    seeds is the mean of all points: that of three seeds alone is hardly known."""
    means_P = scores_PS.mean(axis=1)
    error = (2 * scores_PS.var(axis=1, ddof=1).mean() / scores_PS.shape[1]) ** 0.5
    return np.asarray(means_P >= means_P[best] - NUM_ERRORS * error)


def _scaled(curve: Sequence[Measured], metric: str) -> npt.NDArray[np.float64]:
    """A metric of each point and seed, (P, S), so that its means over seeds run from 0 to 1. What cannot be told counts
    as the worst."""
    values_PS = np.stack([getattr(point, metric) for point in curve])
    is_known_PS = ~np.isnan(values_PS)
    values_PS = np.where(is_known_PS, values_PS, values_PS[is_known_PS].min(initial=np.inf))
    means_P = values_PS.mean(axis=1)
    if not is_known_PS.any() or means_P.max() == means_P.min():
        return np.zeros_like(values_PS)
    width = means_P.max() - means_P.min()
    scaled_PS: npt.NDArray[np.float64] = (values_PS - means_P.min()) / width
    return scaled_PS
