"""Agreement of clusters with true labels: ACC, NMI, ARI and the many-to-one score (docs/METHOD.md, "Hungarian
accuracy"). NMI and ARI also compare two clusterings.

All scores come from one contingency table, so the tables of shards can be added first. Labels may be any integers or
strings, and the number of clusters may differ from the number of classes.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment

from icce_ray.errors import InputError
from icce_ray.metrics.contingency import count_table, nmi_from_counts


def contingency_table(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> sp.csr_array:
    """Images per class and cluster: (classes that occur, clusters that occur) int64, both in ascending order. Raises
    InputError: not one-dimensional, empty, of different lengths, or not integers, booleans or strings."""
    true_N, pred_N = _check(y_true, "y_true"), _check(y_pred, "y_pred")
    if len(true_N) != len(pred_N):
        raise InputError(f"y_true has {len(true_N)} labels and y_pred {len(pred_N)}; they must name the same images")
    classes, true_codes_N = np.unique(true_N, return_inverse=True)
    clusters, pred_codes_N = np.unique(pred_N, return_inverse=True)
    return sp.csr_array(count_table(true_codes_N, pred_codes_N, len(classes), len(clusters)))


def _check(labels: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    array = np.asarray(labels)
    if array.ndim != 1 or not len(array):
        raise InputError(f"{name} has shape {array.shape}; it must hold one label for each image, at least one")
    if array.dtype.kind not in "iubUSO":
        raise InputError(f"{name} is {array.dtype}; labels must be integers or strings")
    return array


def match_to_classes(table: sp.csr_array) -> npt.NDArray[np.int64]:
    """Class (row) of each cluster (column).

    Clusters are matched one to one so that most images agree (Hungarian). If there are more clusters than classes, each
    cluster that is left over gets the class of most of its images.
    """
    counts = table.toarray()
    class_of_cluster: npt.NDArray[np.int64] = counts.argmax(axis=0).astype(np.int64)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    class_of_cluster[columns] = rows
    return class_of_cluster


def clustering_accuracy(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> float:
    """Share of images whose cluster is matched to their class, 0 to 1 (ACC).

    Clusters are matched to classes one to one so that most images agree (Hungarian). With more clusters than classes,
    the clusters that are left over go to the class of most of their images. With fewer, the images of the classes that
    are left over count as wrong.

    Args:
        y_true: (N,) classes, any integers or strings.
        y_pred: (N,) clusters, any integers or strings.

    Raises:
        InputError: not one-dimensional, empty, of different lengths, or not integers or strings.
    """
    return _accuracy(contingency_table(y_true, y_pred))


def normalized_mutual_info(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> float:
    """Mutual information divided by the geometric mean of the two entropies, 0 to 1."""
    return nmi_from_counts(contingency_table(y_true, y_pred))


def evaluate_clustering(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> dict[str, float]:
    """All scores: `acc`, `nmi` (geometric), `nmi_arithmetic`, `ari`, `many_to_one` (purity)."""
    return metrics_from_counts(contingency_table(y_true, y_pred))


def evaluate_with_noise(y_true: npt.NDArray[Any], clusters_N: npt.NDArray[np.integer]) -> dict[str, float]:
    """The scores of :func:`evaluate_clustering` for clusters of which -1 means noise, images without a cluster
    (docs/METHOD.md, "Noise").

    Noise is wrong in `acc` and `many_to_one`, and one more cluster in `nmi`, `nmi_arithmetic` and `ari`. If there is
    some, there are also `num_noise` and `acc_without_noise`, the accuracy over the other images.
    """
    scores = evaluate_clustering(y_true, clusters_N)
    is_noise = clusters_N < 0
    if is_noise.any():
        rest = evaluate_clustering(y_true[~is_noise], clusters_N[~is_noise]) if not is_noise.all() else {}
        share = float((~is_noise).mean())
        scores |= {name: share * rest.get(name, 0.0) for name in ("acc", "many_to_one")}
        scores |= {"num_noise": int(is_noise.sum()), "acc_without_noise": rest.get("acc", 0.0)}
    return scores


def metrics_from_counts(table: sp.csr_array) -> dict[str, float]:
    """The scores of :func:`evaluate_clustering` from a contingency table (classes, clusters)."""
    return {
        "acc": _accuracy(table),
        "nmi": nmi_from_counts(table, "geometric"),
        "nmi_arithmetic": nmi_from_counts(table, "arithmetic"),
        "ari": _adjusted_rand(table),
        "many_to_one": float(table.max(axis=0).sum() / table.sum()),
    }


def _accuracy(table: sp.csr_array) -> float:
    class_of_cluster = match_to_classes(table)
    return float(table.toarray()[class_of_cluster, np.arange(table.shape[1])].sum() / table.sum())


def _adjusted_rand(table: sp.csr_array) -> float:
    together = _num_pairs(table.data)
    in_class, in_cluster = _num_pairs(table.sum(axis=1)), _num_pairs(table.sum(axis=0))
    num_pairs = _num_pairs(np.array([table.sum()]))
    if num_pairs == 0 or in_class == in_cluster == together:
        return 1.0
    # Python integers up to the division: the terms are large and nearly cancel.
    expected = in_class * in_cluster
    return 2 * (together * num_pairs - expected) / ((in_class + in_cluster) * num_pairs - 2 * expected)


def _num_pairs(counts: npt.NDArray[Any]) -> int:
    """Number of pairs of images within each count, summed; exact up to three billion images."""
    values = np.asarray(counts, dtype=np.int64)
    return int((values * (values - 1) // 2).sum())
