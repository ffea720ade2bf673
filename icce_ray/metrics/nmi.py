"""The judge of a consensus: its average normalised mutual information with the heads (ANMI), from counts alone.

Source: Strehl & Ghosh, JMLR 3:583-617 (2002); METHOD section 3. NMI there is the mutual information over the geometric
mean of the two entropies. Entropies are in nats.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.contingency import Table, count_consensus
from icce_ray.consensus.label_matrix import Counts, Heads

Mean = Literal["geometric", "arithmetic"]


def entropy(sizes: npt.NDArray[Any]) -> float:
    """Entropy in nats of the distribution that the counts `sizes` describe; 0 where there is nothing to count."""
    counts = sizes[sizes > 0].astype(np.float64)
    total = counts.sum()
    return max(float(np.log(total) - (counts * np.log(counts)).sum() / total), 0.0) if len(counts) > 1 else 0.0


def mutual_information(table: Table) -> float:
    """Mutual information in nats between the rows and columns of a contingency table; never negative."""
    total = int(table.sum())
    if total == 0:
        return 0.0
    cells = table.ravel() if isinstance(table, np.ndarray) else table.data
    rows, columns = (np.asarray(table.sum(axis=axis)).ravel() for axis in (1, 0))
    surprise = _x_log_x(cells) - _x_log_x(rows) - _x_log_x(columns) + total * float(np.log(total))
    return max(surprise / total, 0.0)


def _x_log_x(counts: npt.NDArray[Any]) -> float:
    """Sum of x log x. Ones count nothing: most of a large table's cells."""
    values = counts[counts > 1].astype(np.float64)
    return float((values * np.log(values)).sum())


def nmi_from_counts(table: Table, mean: Mean = "geometric") -> float:
    """Normalised mutual information, 0 to 1, of a contingency table.

    As in scikit-learn, two labellings that both have a single cluster agree (1), and one of the two alone tells nothing
    about the other (0).
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


def anmi(labels_N: npt.NDArray[Any], heads: Heads, num_clusters: int) -> float:
    """Average NMI (geometric) of a labelling with every head, 0 to 1.

    Args:
        labels_N: (N,) integers 0..num_clusters-1.
        heads: the label matrix. An image that a head gave no label is left out of that head's NMI.
    """
    return anmi_from_counts(count_consensus(labels_N, heads, num_clusters), heads.offsets)


def anmi_from_counts(counts_KC: npt.NDArray[Any], offsets: Counts) -> float:
    """The same from the counts of :func:`icce_ray.consensus.contingency.count_consensus`."""
    return float(np.mean([nmi_from_counts(counts_KC[:, start:stop]) for start, stop in pairwise(offsets)]))
