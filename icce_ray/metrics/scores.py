"""How well clusters match true labels: ACC, NMI, ARI and the many-to-one score (METHOD section 5).

All come from one contingency table, so tables of shards can be added first. Clusters and classes may be any integers
and need not be equally many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment

from icce_ray.consensus.contingency import count_pairs
from icce_ray.errors import InputError
from icce_ray.metrics.nmi import Mean, nmi_from_counts


def contingency_table(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> sp.csr_array:
    """Images per class and cluster: (classes that occur, clusters that occur) int64, both in ascending order.

    Raises:
        InputError: not one-dimensional, empty, of different length, or not integers (booleans and strings will do).
    """
    true_N, pred_N = _check(y_true, "y_true"), _check(y_pred, "y_pred")
    if len(true_N) != len(pred_N):
        raise InputError(f"y_true has {len(true_N)} labels and y_pred {len(pred_N)}; they must name the same images")
    classes, true_codes_N = np.unique(true_N, return_inverse=True)
    clusters, pred_codes_N = np.unique(pred_N, return_inverse=True)
    return count_pairs(true_codes_N, pred_codes_N, len(classes), len(clusters))


def _check(labels: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    array = np.asarray(labels)
    if array.ndim != 1 or not len(array):
        raise InputError(f"{name} has shape {array.shape}; it must hold one label for each image, at least one")
    if array.dtype.kind not in "iubUSO":
        raise InputError(f"{name} is {array.dtype}; labels must be integers or strings")
    return array


def match_clusters(table: sp.csr_array) -> npt.NDArray[np.int64]:
    """Class (row) of each cluster (column): one to one so that most images count (Hungarian), then each cluster that is
    left over goes to the class of most of its images."""
    counts = table.toarray()
    class_of_cluster: npt.NDArray[np.int64] = counts.argmax(axis=0).astype(np.int64)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    class_of_cluster[columns] = rows
    return class_of_cluster


def clustering_accuracy(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> float:
    """Share of images, 0 to 1, whose cluster's matched class is theirs (ACC).

    Clusters are matched to classes one to one so that most images count (Hungarian). With more clusters than classes
    the clusters left over go to the class of most of their images; with fewer, the classes left over count as wrong.

    Args:
        y_true: (N,) classes, any integers or strings.
        y_pred: (N,) clusters, any integers or strings.

    Raises:
        InputError: not one-dimensional, empty, of different length, or not integers.
    """
    return accuracy_from_counts(contingency_table(y_true, y_pred))


def normalized_mutual_info(y_true: npt.ArrayLike, y_pred: npt.ArrayLike, mean: Mean = "geometric") -> float:
    """Mutual information over the mean of the two entropies, 0 to 1. `mean`: `geometric` or `arithmetic`."""
    if mean not in ("geometric", "arithmetic"):
        raise InputError(f"mean is {mean!r}; it must be 'geometric' or 'arithmetic'")
    return nmi_from_counts(contingency_table(y_true, y_pred), mean)


def adjusted_rand_index(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> float:
    """Share of pairs of images on which both labellings agree, corrected for chance: 1 equal, about 0 unrelated."""
    return adjusted_rand_from_counts(contingency_table(y_true, y_pred))


def many_to_one_accuracy(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> float:
    """Share of images, 0 to 1, whose class is the most frequent one of their cluster (purity)."""
    return many_to_one_from_counts(contingency_table(y_true, y_pred))


def evaluate_clustering(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> dict[str, float]:
    """All metrics: `acc`, `nmi` (geometric), `nmi_arithmetic`, `ari`, `many_to_one`."""
    return metrics_from_counts(contingency_table(y_true, y_pred))


def metrics_from_counts(table: sp.csr_array) -> dict[str, float]:
    """The metrics of :func:`evaluate_clustering` from a contingency table (classes, clusters)."""
    return {
        "acc": accuracy_from_counts(table),
        "nmi": nmi_from_counts(table, "geometric"),
        "nmi_arithmetic": nmi_from_counts(table, "arithmetic"),
        "ari": adjusted_rand_from_counts(table),
        "many_to_one": many_to_one_from_counts(table),
    }


def accuracy_from_counts(table: sp.csr_array) -> float:
    class_of_cluster = match_clusters(table)
    return float(table.toarray()[class_of_cluster, np.arange(table.shape[1])].sum() / table.sum())


def many_to_one_from_counts(table: sp.csr_array) -> float:
    return float(table.max(axis=0).sum() / table.sum())


def adjusted_rand_from_counts(table: sp.csr_array) -> float:
    together = _num_pairs(table.data)
    in_class, in_cluster = _num_pairs(table.sum(axis=1)), _num_pairs(table.sum(axis=0))
    num_pairs = _num_pairs(np.array([table.sum()]))
    if num_pairs == 0 or in_class == in_cluster == together:
        return 1.0
    # Whole numbers to the end: the terms are large and nearly cancel.
    expected = in_class * in_cluster
    return 2 * (together * num_pairs - expected) / ((in_class + in_cluster) * num_pairs - 2 * expected)


def _num_pairs(counts: npt.NDArray[Any]) -> int:
    """Pairs of images within each count, together: exact up to four billion images."""
    values = np.asarray(counts, dtype=np.int64)
    return int((values * (values - 1) // 2).sum())
