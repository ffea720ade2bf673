"""Clusterings of parts of a sample with different numbers of clusters, and the measures that compare the numbers
(docs/METHOD.md, "Number of clusters").

They are spectral clusterings of the neighbour graph: that sees groups of any size, and the eigenvectors serve all
numbers. Every seed draws a part of the same sample and clusters it with all numbers.

Shape letters: n images of the sample, m of a part, p of those that are measured, D feature dimension, k neighbours, C
numbers of clusters, V eigenvectors.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, diags
from threadpoolctl import threadpool_limits

from icce_ray.config import ClusterCountConfig
from icce_ray.consensus.graph_choice import largest_eigenvectors
from icce_ray.count.choice import SHARE, Choice, Measured, choose
from icce_ray.count.small_groups import kept_share, recurring_share
from icce_ray.errors import InputError
from icce_ray.metrics.label_free_scores import project_pca, silhouette
from icce_ray.runtime.progress import Progress
from icce_ray.sample.training_set import sample_ids
from icce_ray.sample.unit_features import prepare

Floats = npt.NDArray[Any]

MOST_CLUSTERS, MIN_IMAGES_PER_CLUSTER = 100, 10
"""The upper end of the range if none is given."""
MAX_NUMBERS = 100
"""Above so many numbers in the range, only some are tried, in steps of equal ratios."""
NUM_NEIGHBORS = 10
SHARPNESS = 2.0
"""How fast the weight of an edge falls with its length."""
MAX_MEASURED = 1_000
"""Images that the silhouette is measured on."""
DENSE_SHARE = 0.2
"""If more than this share of all eigenvectors is needed, all are found at once."""


class PartMeasures(NamedTuple):
    """The measures of the clusterings of one part of the sample, one for each number of clusters."""

    silhouettes_C: npt.NDArray[np.float64]
    """-1 to 1; NaN if it is undefined."""
    gaps_C: npt.NDArray[np.float64]
    """Difference of the last eigenvalue that counts and the next; NaN if there is none."""
    labels_Cn: npt.NDArray[np.int32]
    """Cluster of each image of the sample, -1 if it is not in the part."""


def numbers_to_try(asked: ClusterCountConfig, num_images: int) -> list[int]:
    """The numbers of clusters to choose from, for a set of `num_images`, ascending. Raises InputError: a part of the
    sample has fewer images than clusters."""
    num_images = min(num_images, asked.max_images)
    most = asked.max_clusters or max(asked.min_clusters, min(MOST_CLUSTERS, num_images // MIN_IMAGES_PER_CLUSTER))
    if most > _part_size(num_images):
        setting = "max_clusters" if asked.max_clusters else "min_clusters"
        raise InputError(
            f"cluster_count.{setting}: {most} clusters, but {_part_size(num_images)} images are clustered at a time; "
            "lower it to at most that"
        )
    if most - asked.min_clusters < MAX_NUMBERS:
        return list(range(asked.min_clusters, most + 1))
    return sorted({round(number) for number in np.geomspace(asked.min_clusters, most, MAX_NUMBERS)})


def measure_part(
    features_ND: Floats, asked: ClusterCountConfig, numbers: Sequence[int], center: bool, seed: int, number: int
) -> PartMeasures:
    """Cluster part `number` of a sample of the rows of `features_ND` with all `numbers`. `seed` draws the sample."""
    from sklearn.cluster import KMeans  # takes two seconds, and most processes do not need it

    rows_n = sample_ids(len(features_ND), asked.max_images, seed)
    unit_nD = prepare(np.array(features_ND if rows_n is None else features_ND[rows_n]), center)[:]
    rng = np.random.default_rng([seed, number])
    part_m = rng.permutation(len(unit_nD))[: _part_size(len(unit_nD))]
    measured_p = np.arange(min(len(part_m), MAX_MEASURED))
    with threadpool_limits(1), warnings.catch_warnings():  # several threads may round a sum differently
        warnings.simplefilter("ignore")  # k-means warns of copies
        points_pd = project_pca(unit_nD[part_m[measured_p]], seed)
        values_V, rows_mV = _spectrum(weigh_edges(unit_nD[part_m]), max(numbers) + 1, rng)
        silhouettes_C, labels_Cn = np.full(len(numbers), np.nan), np.full((len(numbers), len(unit_nD)), -1, np.int32)
        for place, num_clusters in enumerate(numbers):
            kmeans = KMeans(num_clusters, n_init=1, random_state=number)
            labels_Cn[place, part_m] = labels_m = kmeans.fit_predict(np.ascontiguousarray(rows_mV[:, :num_clusters]))
            if (found := silhouette(points_pd, labels_m[measured_p])) is not None:
                silhouettes_C[place] = found
    gaps_V = np.append(values_V[:-1] - values_V[1:], np.nan)
    return PartMeasures(silhouettes_C, gaps_V[np.array(numbers) - 1], labels_Cn)


def weigh_edges(unit_mD: npt.NDArray[np.float32]) -> csr_matrix:
    """The graph of the nearest neighbours, in both directions (m, m). An edge is weighed by its length against the
    distances of its ends to their last neighbours (Zelnik-Manor and Perona), so that a small group apart from a large
    one keeps its weight."""
    from sklearn.neighbors import NearestNeighbors

    num_neighbors = min(NUM_NEIGHBORS, len(unit_mD) - 1)
    distances_mk, ids_mk = NearestNeighbors(n_neighbors=num_neighbors).fit(unit_mD).kneighbors()
    scale_m = np.maximum(distances_mk[:, -1].astype(np.float64), 1e-6)
    weights_mk = np.exp(-SHARPNESS * distances_mk**2 / (scale_m[:, None] * scale_m[ids_mk]))
    sources = np.repeat(np.arange(len(unit_mD)), num_neighbors)
    directed = csr_matrix((weights_mk.ravel(), (sources, ids_mk.ravel())), shape=(len(unit_mD), len(unit_mD)))
    return directed + directed.T


def _spectrum(
    weights: csr_matrix, number: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The largest `number` eigenvalues of the random walk on the edges (V,), descending, and eigenvectors (m, V)."""
    size = weights.shape[0]
    scale_m = 1 / np.sqrt(np.asarray(weights.sum(axis=1)).ravel())
    normal = diags(scale_m) @ weights @ diags(scale_m)
    start_m = rng.uniform(-1, 1, size)
    few = number <= DENSE_SHARE * size
    values_V, vectors_mV = largest_eigenvectors(normal, number, start_m) if few else np.linalg.eigh(normal.toarray())
    order = np.argsort(-values_V, kind="stable")[:number]
    return values_V[order], vectors_mV[:, order] * scale_m[:, None]


Maker = Callable[[Sequence[int], Sequence[int]], Iterable[tuple[int, PartMeasures]]]
"""Measures some parts with some numbers of clusters, in any order."""


def count_clusters(
    features_ND: Floats, asked: ClusterCountConfig, *, center: bool, seed: int, progress: Progress
) -> Choice:
    """Choose the number of clusters of the rows of `features_ND` in this process. Raises InputError: fewer rows than
    clusters to choose from.

    Args:
        features_ND: (N, D) float16 or float32, finite.
        center: subtract the mean feature.
        seed: draws the sample and its parts.
    """

    def make(parts: Sequence[int], numbers: Sequence[int]) -> Iterable[tuple[int, PartMeasures]]:
        for part in parts:
            yield part, measure_part(features_ND, asked, numbers, center, seed, part)

    return choose_number(len(features_ND), asked, make, progress=progress)


def choose_number(num_images: int, asked: ClusterCountConfig, make: Maker, *, progress: Progress) -> Choice:
    """Choose the number of clusters of `num_images` from the measures that `make` makes. Raises InputError: fewer
    images than clusters to choose from."""
    numbers = numbers_to_try(asked, num_images)
    made: dict[int, PartMeasures] = {}
    progress.update(0, asked.num_seeds)
    for part, measures in make(range(asked.num_seeds), numbers):
        made[part] = measures
        progress.update(len(made), asked.num_seeds)
    parts = [made[part] for part in sorted(made)]
    labels_CSn = [[part.labels_Cn[place] for part in parts] for place in range(len(numbers))]
    curve = [
        Measured(
            num_clusters,
            np.array([part.silhouettes_C[place] for part in parts]),
            np.array([part.gaps_C[place] for part in parts]),
            recurring_share(labels_CSn[place], num_clusters),
        )
        for place, num_clusters in enumerate(numbers)
    ]
    return choose(curve, lambda coarse, fine: kept_share(labels_CSn[coarse], labels_CSn[fine]))


def _part_size(num_images: int) -> int:
    return round(SHARE * num_images)
