"""The judge of a consensus: its average normalised mutual information with the heads (ANMI), from counts alone.

Source: Strehl & Ghosh, JMLR 3:583-617 (2002); METHOD section 3. NMI there is the mutual information over the geometric
mean of the two entropies. Entropies are in nats.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from icce_ray.consensus.contingency import Counts, HeadLabels, count_consensus

Mean = Literal["geometric", "arithmetic"]
Table: TypeAlias = sp.csr_array | npt.NDArray[Any]


def entropy(sizes: npt.NDArray[Any]) -> float:
    """Entropy in nats of the distribution that the counts `sizes` describe; 0 where there is nothing to count."""
    counts = sizes[sizes > 0].astype(np.float64)
    total = counts.sum()
    return max(float(np.log(total) - (counts * np.log(counts)).sum() / total), 0.0) if len(counts) > 1 else 0.0


def mutual_information(table: Table) -> float:
    """Mutual information in nats between the rows and columns of a contingency table; never negative."""
    if isinstance(table, np.ndarray):
        rows, columns = np.nonzero(table)
        counts = table[rows, columns].astype(np.float64)
    else:
        cells = table.tocoo()
        (rows, columns), counts = cells.coords, cells.data.astype(np.float64)
    total = counts.sum()
    if total == 0:
        return 0.0
    log_rows = np.log(np.maximum(np.asarray(table.sum(axis=1)).ravel(), 1))
    log_columns = np.log(np.maximum(np.asarray(table.sum(axis=0)).ravel(), 1))
    ratios = np.log(counts) - log_rows[rows] - log_columns[columns] + np.log(total)
    return max(float((counts * ratios).sum() / total), 0.0)


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


def anmi(labels_N: npt.NDArray[Any], heads: HeadLabels, num_clusters: int) -> float:
    """Average NMI (geometric) of a labelling with every head, 0 to 1.

    Args:
        labels_N: (N,) integers 0..num_clusters-1.
        heads: the label matrix. An image that a head gave no label is left out of that head's NMI.
    """
    return anmi_from_counts(count_consensus(labels_N, heads, num_clusters), heads.offsets)


def anmi_from_counts(counts_KC: Counts, offsets: Counts) -> float:
    """The same from the counts of :func:`icce_ray.consensus.contingency.count_consensus`."""
    return float(np.mean([nmi_from_counts(counts_KC[:, start:stop]) for start, stop in pairwise(offsets)]))
