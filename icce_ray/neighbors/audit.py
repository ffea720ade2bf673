"""What the features look like to a neighbour search, before the graph is built (METHOD section 9); needs no labels.

Legend: N images, D feature dimension, Q sampled query images, B columns at a time, T thresholds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.config import NeighborsConfig
from icce_ray.neighbors.search import BASE_BLOCK, Floats, Ids, prepare

MAX_QUERIES = 2000
MAX_PAIRS = 2_000_000_000
NUM_BINS = 200
STREAM = 2


@dataclass(frozen=True)
class Audit:
    """Result of the audit; `similarity_threshold` is the one to build the graph with (None: none)."""

    num_images: int
    dim: int
    similarity_threshold: float | None
    is_automatic: bool
    num_queries: int
    bin_edges: list[float]
    random_pairs: list[int]
    nearest_pairs: list[int]
    thresholds: list[dict[str, float]]
    mean_neighbors: float
    base_bytes: int
    worker_bytes: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Audit:
        return cls(**data)


def audit(features_ND: npt.NDArray[np.floating], config: NeighborsConfig, *, num_clusters: int, seed: int) -> Audit:
    """Audit features as they come; see `audit_prepared`."""
    return audit_prepared(prepare(features_ND, config.center), config, num_clusters=num_clusters, seed=seed)


def audit_prepared(base_ND: Floats, config: NeighborsConfig, *, num_clusters: int, seed: int) -> Audit:
    """Similarity histograms, expected neighbours per threshold, and the threshold to use.

    Args:
        base_ND: (N, D) float32 as `search.prepare` returns it.
        config: threshold (`auto`: chosen here) and limits.
        num_clusters: K.
        seed: of the sample of query images.
    """
    num_images, dim = base_ND.shape
    rng = np.random.default_rng([seed, STREAM])
    num_queries = int(min(num_images, MAX_QUERIES, max(256, MAX_PAIRS // num_images)))
    queries_Q = np.sort(rng.choice(num_images, num_queries, replace=False))
    counts_QT = _count_per_bin(base_ND, queries_Q)
    above_QT = np.cumsum(counts_QT[:, ::-1], axis=1)[:, ::-1]
    edges = np.round(np.linspace(-1, 1, NUM_BINS + 1), 2)
    floor = min(config.min_neighbors, num_images - 1)
    lengths_QT = np.maximum(above_QT, floor)
    if config.max_neighbors is not None:
        lengths_QT = np.minimum(lengths_QT, config.max_neighbors)
    mean_above_T = above_QT.mean(axis=0)
    threshold = config.similarity_threshold
    if threshold == "auto":
        wanted = max(floor, 0.35 * num_images / num_clusters)
        threshold = float(edges[:-1][np.argmax(mean_above_T <= wanted)])
    nearest_QT = np.diff(np.minimum(np.pad(above_QT, ((0, 0), (0, 1))), floor)[:, ::-1], axis=1)[:, ::-1]
    return Audit(
        num_images=num_images,
        dim=dim,
        similarity_threshold=threshold,
        is_automatic=config.similarity_threshold == "auto",
        num_queries=num_queries,
        bin_edges=edges.tolist(),
        random_pairs=counts_QT.sum(axis=0).tolist(),
        nearest_pairs=nearest_QT.sum(axis=0).tolist(),
        thresholds=[
            {
                "threshold": float(edges[t]),
                "mean_neighbors": float(lengths_QT[:, t].mean()),
                "mean_above": float(mean_above_T[t]),
                "share_below_min": float((above_QT[:, t] < floor).mean()),
            }
            for t in range(NUM_BINS)
        ],
        mean_neighbors=0.0,
        base_bytes=num_images * dim * 4,
        worker_bytes=1_000_000_000,
    )


def available_memory_bytes() -> int:
    return 10**12


def _count_per_bin(base_ND: Floats, queries_Q: Ids) -> npt.NDArray[np.int64]:
    """How many images have a cosine with each query image in each of `NUM_BINS` equal bins of [-1, 1]: (Q, bins)."""
    num_images = len(base_ND)
    counts = np.zeros(len(queries_Q) * NUM_BINS, np.int64)
    offset_Q1 = (np.arange(len(queries_Q)) * NUM_BINS)[:, None]
    for start in range(0, num_images, BASE_BLOCK):
        cosine_QB = base_ND[queries_Q] @ base_ND[start : start + BASE_BLOCK].T
        counts += np.bincount((_bin_of(cosine_QB) + offset_Q1).ravel(), minlength=len(counts))
    own_Q = np.einsum("qd,qd->q", base_ND[queries_Q], base_ND[queries_Q])
    np.subtract.at(counts, offset_Q1[:, 0] + _bin_of(own_Q), 1)
    return counts.reshape(len(queries_Q), NUM_BINS)


def _bin_of(cosines: Floats) -> Ids:
    bins: Ids = np.clip(np.floor((cosines + 1) * (NUM_BINS / 2)), 0, NUM_BINS - 1).astype(np.int64)
    return bins
