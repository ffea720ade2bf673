"""Features with everything that trips a search, and neighbours and similarities by brute force."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from icce_ray.neighbors.graph import NeighborGraph
from icce_ray.sample.unit_features import RESOLUTION


def normalised(features: npt.NDArray[np.floating], center: bool) -> npt.NDArray[np.float64]:
    rows = features.astype(np.float64)
    if center:
        rows = rows - rows.mean(axis=0)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 1e-9)


def similarity_units(base: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """Cosines of all pairs in float64, in units of the resolution; (N, N)."""
    rows = base.astype(np.float64)
    return np.rint(rows @ rows.T / RESOLUTION).astype(np.int64)


def nearest(units: npt.NDArray[np.int64], image: int, k: int) -> list[int]:
    """The k most similar others; of equally similar ones the lower ids."""
    order = np.argsort(-units[image], kind="stable")
    return order[order != image][:k].tolist()


def above(units: npt.NDArray[np.int64], image: int, threshold: float) -> list[int]:
    found = np.flatnonzero(units[image] >= round(threshold / RESOLUTION))
    return found[found != image].tolist()


def neighbor_lists(base: npt.NDArray[np.floating], threshold: float | None, min_neighbors: int) -> list[list[int]]:
    """The adaptive rule without an upper limit, image by image."""
    units = similarity_units(base)
    lists = []
    for image in range(len(base)):
        hits = [] if threshold is None else above(units, image, threshold)
        if len(hits) < min(min_neighbors, len(base) - 1):
            hits = nearest(units, image, min_neighbors)
        lists.append(sorted(hits))
    return lists


def lists_of(graph: NeighborGraph) -> list[list[int]]:
    return [neighbors.tolist() for neighbors in np.split(graph.indices, graph.indptr[1:-1])]


def awkward_features(num_images: int, dim: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Clusters, with duplicates, scaled duplicates, opposites and zero vectors scattered over all rows."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((5, dim))
    features = (centres[rng.integers(0, 5, num_images)] + 0.7 * rng.standard_normal((num_images, dim))).astype(
        np.float32
    )
    rows = rng.permutation(num_images)
    tenth = max(1, num_images // 10)
    features[rows[:tenth]] = features[rows[0]]
    features[rows[tenth : tenth + 4]] = 4 * features[rows[tenth]]
    features[rows[-3:]] = 0.0
    features[rows[-4]] = -features[rows[-5]]
    return features
