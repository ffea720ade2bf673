"""Where most images have no majority of the heads, these get the cluster that their features fit best (docs/METHOD.md,
"Doubtful images"): self-training with a linear discriminant.

Shape letters: N images, n images of a part, d doubtful images, K clusters, D dimensions.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from threadpoolctl import threadpool_limits

from icce_ray.consensus.label_matrix import Heads, Images, Labels, count_labels, ranges
from icce_ray.consensus.partition import PartitionError
from icce_ray.consensus.refinement import leave_no_cluster_empty

MAX_AGREEMENT = 0.5
"""An image is doubtful if no more than this share of the heads places it where the consensus does."""
MIN_SHARE = 0.5
"""If fewer of the images are doubtful, the heads know them better than a linear discriminant does."""
NUM_ROUNDS = 5
"""At most: each places the doubtful images by the means of the clusters that the round before made."""
MAX_SAMPLE, MAX_SAMPLE_ELEMENTS = 10_000, 1 << 24
"""Images, and numbers of their features, that the covariance is measured on."""
MAX_DIMS = 4_096
"""The covariance is inverted, which takes seconds with more."""
MAX_TABLE = 1 << 24
"""Numbers of a table of K x D: 134 MB."""
MAX_WORK = 500_000_000_000
"""Multiplications of a round: half a minute on one core."""
PART_ELEMENTS = 1 << 23
"""Numbers of the features of a part, or of its images times the clusters."""
Floats = npt.NDArray[np.float64]


class UnitRows(Protocol):
    """Features of unit length, read by slices or ids. Pickles, if the heads' `map` works elsewhere."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]: ...


def find_doubtful(agreement_N: npt.NDArray[np.float32]) -> Images:
    """The doubtful images (d,), ascending; none, if they are too few."""
    doubtful_d = np.flatnonzero(agreement_N <= MAX_AGREEMENT)
    return doubtful_d if len(doubtful_d) >= MIN_SHARE * len(agreement_N) else doubtful_d[:0]


def place_doubtful(
    labels_N: Labels, doubtful_d: Images, heads: Heads, unit_features: Callable[[], UnitRows], num_clusters: int
) -> Labels:
    """The labels (N,) with the doubtful images in the clusters that they fit best. No cluster is emptied.

    Raises PartitionError: the input is too large, it has noise, or its features don't differ within the clusters.
    """
    if heads.noise:
        raise PartitionError(heads.noise)
    unit = unit_features()
    _check_size(len(doubtful_d), unit.shape, num_clusters)
    parts = ranges(len(labels_N), max(1, PART_ELEMENTS // unit.shape[1]))
    doubtful_parts = ranges(len(doubtful_d), max(1, PART_ELEMENTS // max(unit.shape[1], num_clusters)))
    covariance_DD: Floats | None = None
    for _ in range(NUM_ROUNDS):
        sizes_K = count_labels(labels_N, num_clusters)
        sums = heads.map(_sum_part, parts, labels_N, unit, num_clusters)  # added in the order of the parts
        means_KD = sum(sums, start=np.zeros((num_clusters, unit.shape[1]))) / np.maximum(sizes_K, 1)[:, None]
        if covariance_DD is None:
            covariance_DD = within_covariance(labels_N, means_KD, unit)
        with threadpool_limits(1):  # several threads may round a sum differently
            weights_DK = np.linalg.solve(covariance_DD, means_KD.T)
        with np.errstate(divide="ignore"):  # an empty cluster gets no image
            bias_K = np.log(sizes_K / len(labels_N)) - (means_KD * weights_DK.T).sum(axis=1) / 2
        placed_N = labels_N.copy()
        placed = heads.map(_place_part, doubtful_parts, doubtful_d, unit, weights_DK, bias_K)
        placed_N[doubtful_d] = np.concatenate(list(placed))
        movers = leave_no_cluster_empty(np.flatnonzero(placed_N != labels_N), labels_N, num_clusters)
        if not len(movers):
            break
        labels_N = labels_N.copy()
        labels_N[movers] = placed_N[movers]
    return labels_N


def _check_size(num_doubtful: int, shape: tuple[int, int], num_clusters: int) -> None:
    num_images, dim = shape
    work = min(num_images, MAX_SAMPLE) * dim**2 + num_doubtful * num_clusters * dim
    for number, limit, what in (
        (dim, MAX_DIMS, "dimensions"),
        (num_clusters * dim, MAX_TABLE, "numbers in the clusters' means"),
        (work, MAX_WORK, "multiplications"),
    ):
        if number > limit:
            raise PartitionError(f"{number:,} {what} are over the limit of {limit:,}")


def within_covariance(labels_N: Labels, means_KD: Floats, unit: UnitRows) -> Floats:
    """Covariance (D, D) of the features about the means of their clusters, shrunk by OAS (Chen et al. 2010), measured
    on evenly spaced images."""
    from sklearn.covariance import oas  # takes seconds, and most processes of the consensus do not need it

    num_images, dim = unit.shape
    size = min(num_images, MAX_SAMPLE, max(1, MAX_SAMPLE_ELEMENTS // dim))
    rows = np.linspace(0, num_images - 1, size).astype(np.int64)
    with threadpool_limits(1):  # several threads may round a sum differently
        covariance_DD: Floats = oas(unit[rows] - means_KD[labels_N[rows]], assume_centered=True)[0]
    if not covariance_DD.trace() > 0:
        raise PartitionError("the features don't differ within the clusters")
    return covariance_DD


def _sum_part(heads: Heads, start: int, stop: int, labels_N: Labels, unit: UnitRows, num_clusters: int) -> Floats:
    """Sum of the features of each cluster (K, D) over some images."""
    labels_n, ones_n = labels_N[start:stop], np.ones(stop - start)
    members_nK = csr_array((ones_n, labels_n, np.arange(stop - start + 1)), shape=(stop - start, num_clusters))
    sums_KD: Floats = members_nK.T @ unit[start:stop].astype(np.float64)
    return sums_KD


def _place_part(
    heads: Heads, start: int, stop: int, doubtful_d: Images, unit: UnitRows, weights_DK: Floats, bias_K: Floats
) -> Labels:
    """The cluster with the highest discriminant, for some of the doubtful images."""
    features_nD = unit[doubtful_d[start:stop]].astype(np.float64)
    with threadpool_limits(1):  # several threads may round a sum differently
        best_n: Labels = (features_nD @ weights_DK + bias_K).argmax(axis=1).astype(np.int32)
    return best_n
