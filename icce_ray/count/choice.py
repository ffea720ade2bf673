"""Which number of clusters is chosen from the measurements, and how certain it is (docs/METHOD.md, "Number of
clusters"). Pure maths.

Two measures complement each other. *Silhouette*, in the space of the principal components, is how much nearer images
are to their own cluster than to the next. The *gap* is how much more of the neighbour graph leaves the next cluster:
it peaks where groups end, however unequal they are, but knows no second best, and says nothing where it is small.
Both are scaled over all numbers tried; their mean is the *score*.

Two clusters are the coarsest split, which the silhouette favours: where numbers above three are as good and no clear
gap follows the second cluster, the best of the others in the range is chosen.

Both measures hardly see a group of about ten images. So a number beyond the range, or beyond a choice of two or three,
is taken if nearly all of its clusters *recur* in the other parts and nearly all images stay together: it splits small
groups off.

The *range* says how certain the choice is, by the silhouette alone. A number is as good as the best if it is at most
one standard error of the difference behind. The range runs down and up to the last such number before two in a row
that are not, and to the choice. The parts overlap, so the variance over images is SHARE / (1 - SHARE) times the one
over parts (the jackknife that leaves out several at a time).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

METRICS = ("silhouette", "gap", "recurring")
CLEAR_GAP = 0.08
"""A gap that counts as much as the best silhouette. If the largest one is smaller, all count for less."""
COARSE = 3
"""A choice that may hide groups which the silhouette counts as good. A range that ends here or before has no finer
number to offer than two clusters."""
MOST = 0.9
"""Nearly all: the share of clusters that recur and of images that stay together where small groups are split off."""
SHARE = 0.9
"""Share of the sample that each part holds."""
NUM_ERRORS = 2.0
"""Standard errors on either side of a mean in the tables: an interval of about 95%."""


@dataclass(frozen=True)
class Measured:
    """The measures of one number of clusters. Arrays have a value for each part, NaN if it is undefined."""

    num_clusters: int
    silhouette: npt.NDArray[np.float64]
    """-1 to 1."""
    gap: npt.NDArray[np.float64]
    """Difference of the eigenvalues of this cluster and the next, 0 to 2."""
    recurring: npt.NDArray[np.float64]
    """Share of the clusters that recur in other parts, 0 to 1."""


@dataclass(frozen=True)
class Choice:
    """The number of clusters, and how certain it is."""

    num_clusters: int
    low: int
    high: int
    """The numbers from `low` to `high` are as good as the choice within the spread over images."""
    curve: tuple[Measured, ...]
    """The measures, by ascending number of clusters."""
    scores: npt.NDArray[np.float64]
    """Score of each point of the curve and each part, (points, parts), about 0 to 1."""

    def sentence(self) -> str:
        """The choice and its uncertainty in words."""
        tried = f"tried {self.curve[0].num_clusters} to {self.curve[-1].num_clusters}"
        text = f"{self.num_clusters} clusters were chosen, {tried}"
        if self.low == self.high:
            text += "; no number beside it is as good within the spread of images"
        else:
            text += f"; {self.low} to {self.high} are as good within the spread of images"
        if self.num_clusters in (self.curve[0].num_clusters, self.curve[-1].num_clusters):
            text += ". The best lies at the end of the range: widen it (cluster_count.min_clusters, max_clusters)"
        return text

    def by_seed(self) -> pa.Table:
        """A row per number of clusters and seed."""
        rows = [
            {
                "num_clusters": point.num_clusters,
                "seed": seed,
                **{metric: float(getattr(point, metric)[seed]) for metric in METRICS},
                "score": float(scores[seed]),
            }
            for point, scores in zip(self.curve, self.scores, strict=True)
            for seed in range(len(scores))
        ]
        return pa.Table.from_pylist(rows)

    def by_count(self) -> pa.Table:
        """A row per number of clusters: for each metric and for the score, the mean over parts, the standard deviation
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


def choose(curve: Sequence[Measured], kept_share: Callable[[int, int], float]) -> Choice:
    """The number with the highest score, unless it is a doubtful two or misses small groups.

    Args:
        curve: by ascending number of clusters.
        kept_share: the share of images that stay together from one place of the curve to a later one, 0 to 1.
    """
    silhouettes_PS = _scaled(curve, "silhouette")
    scores_PS = (silhouettes_PS + _scaled(curve, "gap", least_width=CLEAR_GAP)) / 2
    best = int(scores_PS.mean(axis=1).argmax())
    means_P = silhouettes_PS.mean(axis=1)
    # The variance is the mean over all points: the parts of one point are too few to estimate it.
    error = (2 * SHARE / (1 - SHARE) * silhouettes_PS.var(axis=1, ddof=1).mean()) ** 0.5
    is_as_good_P, top = means_P >= means_P.max() - error, int(means_P.argmax())
    first = min(best, top - _reach(is_as_good_P[:top][::-1]))
    last = max(best, top + _reach(is_as_good_P[top + 1 :]))
    numbers = [point.num_clusters for point in curve]
    if numbers[best] == 2 and numbers[last] > COARSE and float(np.mean(curve[best].gap)) < CLEAR_GAP:
        best = 1 + int(scores_PS.mean(axis=1)[1 : last + 1].argmax())
    for place in range(len(curve) - 1, best if numbers[best] <= COARSE else last, -1):
        if np.mean(curve[place].recurring) >= MOST and kept_share(best, place) >= MOST:
            best, last = place, max(last, place)
            break
    return Choice(numbers[best], numbers[first], numbers[last], tuple(curve), scores_PS)


def _reach(is_as_good: npt.NDArray[np.bool_]) -> int:
    """Steps to the last one that is as good, before two in a row that are not."""
    reached = 0
    for step, good in enumerate(is_as_good, start=1):
        if good:
            reached = step
        elif step > reached + 1:
            break
    return reached


def _scaled(curve: Sequence[Measured], metric: str, least_width: float = 0.0) -> npt.NDArray[np.float64]:
    """A metric of each point and part (P, S), scaled so that its means over parts run from 0 to 1, or less far if they
    span less than `least_width`. Undefined values count as the worst."""
    values_PS = np.stack([getattr(point, metric) for point in curve])
    is_known_PS = ~np.isnan(values_PS)
    values_PS = np.where(is_known_PS, values_PS, values_PS[is_known_PS].min(initial=np.inf))
    means_P = values_PS.mean(axis=1)
    if not is_known_PS.any() or means_P.max() == means_P.min():
        return np.zeros_like(values_PS)
    width = max(means_P.max() - means_P.min(), least_width)
    scaled_PS: npt.NDArray[np.float64] = (values_PS - means_P.min()) / width
    return scaled_PS
