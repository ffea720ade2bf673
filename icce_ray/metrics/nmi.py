"""Normalised mutual information from contingency counts (docs/METHOD.md, "Objective").

The NMI of Strehl & Ghosh (JMLR 3:583-617, 2002) is the mutual information divided by the geometric mean of the two
entropies. Entropies are in nats.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from icce_ray.metrics.contingency import Table

Mean = Literal["geometric", "arithmetic"]


def entropy(sizes: npt.NDArray[Any]) -> float:
    """Entropy in nats of the distribution given by the counts `sizes`; 0 if there are none."""
    counts = sizes[sizes > 0].astype(np.float64)
    total = counts.sum()
    return max(float(np.log(total) - (counts * np.log(counts)).sum() / total), 0.0) if len(counts) > 1 else 0.0


def mutual_information(table: Table) -> float:
    """Mutual information in nats between the rows and columns of a contingency table, never negative."""
    total = int(table.sum())
    if total == 0:
        return 0.0
    cells = table.ravel() if isinstance(table, np.ndarray) else table.data
    rows, columns = (np.asarray(table.sum(axis=axis)).ravel() for axis in (1, 0))
    surprise = _x_log_x(cells) - _x_log_x(rows) - _x_log_x(columns) + total * float(np.log(total))
    return max(surprise / total, 0.0)


def _x_log_x(counts: npt.NDArray[Any]) -> float:
    """Sum of x log x. Counts of 1 add nothing, and most counts of a large table are 1."""
    values = counts[counts > 1].astype(np.float64)
    return float((values * np.log(values)).sum())


def nmi_from_counts(table: Table, mean: Mean = "geometric") -> float:
    """Normalised mutual information of a contingency table, 0 to 1.

    As in scikit-learn, two labellings with a single cluster each agree (1). If only one of them has a single cluster,
    it says nothing about the other (0).
    """
    row_sizes = np.asarray(table.sum(axis=1)).ravel()
    column_sizes = np.asarray(table.sum(axis=0)).ravel()
    if np.count_nonzero(row_sizes) <= 1 and np.count_nonzero(column_sizes) <= 1:
        return 1.0
    entropies = entropy(row_sizes), entropy(column_sizes)
    if min(entropies) == 0.0:
        return 0.0
    norm = float(np.sqrt(entropies[0] * entropies[1])) if mean == "geometric" else sum(entropies) / 2
    return min(mutual_information(table) / norm, 1.0)


def anmi_from_counts(counts_KC: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> float:
    """Average NMI (geometric) of a labelling with several others, 0 to 1.

    Args:
        counts_KC: (K, C) contingency tables of the labelling with each of the others, side by side.
        offsets: first column of each table, and C.
    """
    return float(np.mean([nmi_from_counts(counts_KC[:, start:stop]) for start, stop in pairwise(offsets)]))
