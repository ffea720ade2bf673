"""Which numbers of clusters are tried, and which one is chosen from the measurements (docs/METHOD.md, "Number of
clusters"). Pure maths.

Two measures complement each other. *Stability* is the adjusted Rand index of heads of different seeds: with too few
clusters each head merges clusters in its own way, and with too many each splits them in its own way. *Silhouette*, in
the space of the principal components, is how much nearer images are to their own cluster than to the next. Stability
stays high a little above the true number, where the spare clusters are small; the silhouette drops there at once but
rises only slowly below it. Each is scaled to 0..1 over all numbers tried; their mean, the *score*, peaks in between.
The generalisation score is reported but not used: it favours few clusters.

The *range* says how certain the choice is. A number is as good as the choice if its score is at most two standard
errors of the difference over seeds (about 95%) behind. The range runs down and up from the choice to the last such
number before two in a row that are not. It reflects the spread over seeds, not over images, nor how far the two
measures disagree, which the curves show.
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
"""Standard errors on either side of a mean: an interval of about 95%."""


@dataclass(frozen=True)
class Measured:
    """The measures of one number of clusters. Arrays have a value for each seed, NaN if it is undefined."""

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
    """The number of clusters, and how certain it is."""

    num_clusters: int
    low: int
    high: int
    """The numbers from `low` to `high` are as good as the choice within the spread over seeds."""
    curve: tuple[Measured, ...]
    """The measures, by ascending number of clusters."""
    scores: npt.NDArray[np.float64]
    """Score of each point of the curve and each seed, (points, seeds), about 0 to 1."""

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
        """A row per number of clusters: for each metric and for the score, the mean over seeds, the standard deviation
        (`_std`) and the interval of two standard errors around the mean (`_low`, `_high`)."""
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
    """Search from coarse to fine: a geometric grid over low..high, then the geometric means of the best number and its
    neighbours, until these are within 5% or 1 of it.

    Args:
        measure: measures the given numbers of clusters, in any order.
    """
    known: dict[int, Measured] = {}
    wanted = coarse_grid(low, high)
    while wanted:
        known |= {point.num_clusters: point for point in measure(wanted)}
        choice = choose(known)
        wanted = between(sorted(known), choice.num_clusters)
    return choice


def coarse_grid(low: int, high: int) -> list[int]:
    """Numbers from `low` to `high`, both included, in steps of at most about COARSE_RATIO."""
    steps = max(1, math.ceil(math.log(high / low, COARSE_RATIO)))
    return sorted({round(value) for value in np.geomspace(low, high, steps + 1)})


def between(known: Sequence[int], best: int) -> list[int]:
    """The numbers halfway between `best` and its neighbours among `known`, ascending."""
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
    """Steps to the last one that is as good, before two in a row that are not."""
    reached = 0
    for step, good in enumerate(is_as_good, start=1):
        if good:
            reached = step
        elif step > reached + 1:
            break
    return reached


def _is_as_good(scores_PS: npt.NDArray[np.float64], best: int) -> npt.NDArray[np.bool_]:
    """Whether each point (P,) is at most two standard errors of the difference behind the best. The variance over seeds
    is the mean over all points: three seeds of one point are too few to estimate it."""
    means_P = scores_PS.mean(axis=1)
    error = (2 * scores_PS.var(axis=1, ddof=1).mean() / scores_PS.shape[1]) ** 0.5
    return np.asarray(means_P >= means_P[best] - NUM_ERRORS * error)


def _scaled(curve: Sequence[Measured], metric: str) -> npt.NDArray[np.float64]:
    """A metric of each point and seed (P, S), scaled so that its means over seeds run from 0 to 1. Undefined values
    count as the worst."""
    values_PS = np.stack([getattr(point, metric) for point in curve])
    is_known_PS = ~np.isnan(values_PS)
    values_PS = np.where(is_known_PS, values_PS, values_PS[is_known_PS].min(initial=np.inf))
    means_P = values_PS.mean(axis=1)
    if not is_known_PS.any() or means_P.max() == means_P.min():
        return np.zeros_like(values_PS)
    width = means_P.max() - means_P.min()
    scaled_PS: npt.NDArray[np.float64] = (values_PS - means_P.min()) / width
    return scaled_PS
