"""Approximate search: an inverted file (IVF) looks only into the cells that a query's neighbours are likely to be in.

Cells are those of a k-means learnt from a sample, the same for all shards, and a query looks into its `num_probes`
nearest ones. What is in them is searched exactly, so the neighbours do not depend on the shards either, and the recall
is the share of the true neighbours that lie in those cells: `plan_cells` measures it and chooses `num_probes` by it.

Legend: N images, D feature dimension, C cells, n images of a shard, Q queries, P pairs, k list length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt
from faiss.contrib.ivf_tools import add_preassigned, range_search_preassigned, search_preassigned

from icce_ray.config import NeighborsConfig
from icce_ray.neighbors.faiss_engine import (
    BASE_BLOCK,
    CpuEngine,
    exact_similarity,
    is_unsearched,
    lowest_border,
    radius,
    similarity_error,
)
from icce_ray.neighbors.neighbor_precision import spherical_kmeans
from icce_ray.neighbors.rule import PairList, Rule
from icce_ray.neighbors.search import most_similar
from icce_ray.neighbors.unit_features import Floats, Ids, PreparedFeatures, Queries

STREAM = 3
"""Of the seed."""
RECALL_AT = 50
MAX_EXACT_PRODUCTS = 5e15
MAX_SHARE_OF_EXACT = 0.5
NUM_SAMPLES = 256
WANTED_SHARE_OF_MISSES = 0.8
CELLS_PER_SQRT = 4
TRAINING_IMAGES_PER_CELL = 64
NUM_ITERATIONS = 10
FIRST_PROBES_SHARE = 8


@dataclass(frozen=True)
class Cells:
    """The cells, and how many of them a query looks into.

    centroids_CD: float32, unit length. recall: share of the `RECALL_AT` most similar images that are found, measured on
    images that `num_probes` was not chosen on. operations_share: products, of those of an exact search.
    """

    centroids_CD: Floats
    num_probes: int
    recall: float
    operations_share: float


def choose_method(
    prepared: PreparedFeatures, config: NeighborsConfig, seed: int, predicted_s: float
) -> tuple[Cells | None, str]:
    """Whether to search approximately, and why.

    Only counted operations decide, not what the machines could do in what time: the neighbours must not depend on
    where they were found. The time is in the reason, for whoever wants to choose otherwise.

    Args:
        prepared: the features of N images.
        config: method and recall.
        seed: of samples and k-means starts.
        predicted_s: of an exact search by one process.

    Returns:
        The cells of an approximate search, None for an exact one; the reason.
    """
    num_images, dim = prepared.shape
    products = float(num_images) ** 2 * dim
    counted = f"{products:.1e} products, about {predicted_s / 3600:,.1f} hours for one such process"
    if config.method == "exact":
        return None, f"as asked for: {counted}"
    if config.method == "auto" and products <= MAX_EXACT_PRODUCTS:
        return None, f"few enough images: {counted}"
    cells = plan_cells(prepared, seed, config.min_recall, min_size=min(config.min_neighbors + 1, num_images))
    saving = f"{cells.operations_share:.1%} of an exact search's {counted}"
    if config.method == "auto" and cells.operations_share > MAX_SHARE_OF_EXACT:
        return None, f"an inverted file would save too little: {saving}"
    return cells, f"{'as asked for' if config.method == 'ivf' else 'many images'}: {saving}"


def plan_cells(prepared: PreparedFeatures, seed: int, min_recall: float, min_size: int) -> Cells:
    """Learn cells, and choose the fewest probes that reach `min_recall` on sampled images.

    Args:
        prepared: the features of N images.
        seed: of samples and k-means starts.
        min_recall: of the `RECALL_AT` most similar images, compared with an exact search.
        min_size: images in the smallest cell, so that whoever looks into one finds enough.
    """
    num_images = len(prepared)
    rng = np.random.default_rng([seed, STREAM])
    num_cells = int(
        np.clip(2 ** round(np.log2(CELLS_PER_SQRT * num_images**0.5)), 1, max(1, num_images // (2 * min_size)))
    )
    num_training = min(num_images, TRAINING_IMAGES_PER_CELL * num_cells)
    sample_MD = prepared[np.sort(rng.choice(num_images, num_training, replace=False))]
    centroids_CD = spherical_kmeans(sample_MD, num_cells, int(rng.integers(2**31)), NUM_ITERATIONS)
    # The images of cells that go have others to go to, which only grow.
    sizes_C = _cell_sizes(prepared, centroids_CD)
    is_large_C = sizes_C >= min(min_size, sizes_C.max())
    centroids_CD = np.ascontiguousarray(centroids_CD[is_large_C])
    sizes_C = _cell_sizes(prepared, centroids_CD)
    num_cells = len(centroids_CD)

    queries = rng.choice(num_images, min(num_images, 2 * NUM_SAMPLES), replace=False)
    _, neighbors_Qk = most_similar(prepared, queries, RECALL_AT)
    unique, position_P = np.unique(neighbors_Qk, return_inverse=True)
    cells_Qk = nearest_cells(prepared[unique], centroids_CD, 1)[:, 0][position_P].reshape(neighbors_Qk.shape)
    ranking_QC = nearest_cells(prepared[queries], centroids_CD, num_cells)
    rank_QC = np.argsort(ranking_QC, axis=1)
    rank_Qk = np.take_along_axis(rank_QC, cells_Qk, axis=1)
    half = len(queries) // 2
    # A little more on these images than is asked for, so that others reach it too.
    wanted = 1.0 - WANTED_SHARE_OF_MISSES * (1.0 - min_recall)
    num_probes = int(np.quantile(rank_Qk[:half], wanted, method="higher")) + 1
    visited = float(np.take(sizes_C, ranking_QC[:, :num_probes]).sum(axis=1).mean()) / num_images
    return Cells(
        centroids_CD,
        num_probes,
        recall=float((rank_Qk[half:] < num_probes).mean()),
        operations_share=num_cells / num_images + visited * (1 + 1 / FIRST_PROBES_SHARE),
    )


def nearest_cells(rows_nD: Floats, centroids_CD: Floats, num_cells: int) -> Ids:
    """(n, num_cells) the nearest cells of each row, the nearest first."""
    _, cells = faiss.knn(np.ascontiguousarray(rows_nD), centroids_CD, num_cells, metric=faiss.METRIC_INNER_PRODUCT)
    nearest: Ids = np.ascontiguousarray(cells, dtype=np.int64)
    return nearest


def _cell_sizes(prepared: PreparedFeatures, centroids_CD: Floats) -> Ids:
    sizes_C = np.zeros(len(centroids_CD), np.int64)
    for start in range(0, len(prepared), BASE_BLOCK):
        cells_B = nearest_cells(prepared[start : start + BASE_BLOCK], centroids_CD, 1)[:, 0]
        sizes_C += np.bincount(cells_B, minlength=len(centroids_CD))
    return sizes_C


class IvfEngine(CpuEngine):
    """Holds the rows of a shard in FAISS's inverted lists, with a column of ones as `FaissEngine` does.

    Args:
        prepared: the features of all images.
        ids_n: the shard's images, ascending.
        cells: the same for all shards.
    """

    def __init__(self, prepared: PreparedFeatures, ids_n: Ids, cells: Cells) -> None:
        dim = prepared.shape[1]
        self.prepared = prepared
        self.ids_n = ids_n
        self.cells = cells
        self.error = similarity_error(dim)
        self._quantizer = faiss.IndexFlatIP(dim + 1)  # never asked: cells are found without the column of ones
        self._index = faiss.IndexIVFFlat(self._quantizer, dim + 1, len(cells.centroids_CD), faiss.METRIC_INNER_PRODUCT)
        self._index.is_trained = True
        # Whole blocks of the collection, so that rounding puts an image into the same cell whatever the shards.
        for start in range(0, len(prepared), BASE_BLOCK):
            first, last = np.searchsorted(ids_n, [start, start + BASE_BLOCK])
            if first == last:
                continue
            block_BD = prepared[start : start + BASE_BLOCK]
            chosen = ids_n[first:last] - start
            cells_n = nearest_cells(block_BD, cells.centroids_CD, 1)[chosen, 0]
            rows_nE = np.column_stack([block_BD[chosen], np.ones(len(chosen), np.float32)])
            # A name of its own: FAISS is handed a bare pointer, and a temporary array would be gone by then.
            block_ids = np.ascontiguousarray(ids_n[first:last])
            add_preassigned(self._index, rows_nE, cells_n, block_ids)

    def pairs(self, queries: Queries, rule: Rule) -> Iterator[PairList]:
        features_QD = queries.features
        probes_Qp = self._probes(features_QD)
        # One more than needed: the image itself may be among them.
        bounds_Q = self._lower_bounds(features_QD, probes_Qp, rule.min_neighbors + 1)
        unsearched_Q, border = is_unsearched(queries, rule, self.error), lowest_border(rule, self.error)
        radius_Q = radius(bounds_Q, border, unsearched_Q, self.error)
        queries_QE = np.column_stack([features_QD, -radius_Q])
        self._index.nprobe = probes_Qp.shape[1]
        limits, above_P, ids_P = range_search_preassigned(self._index, queries_QE, 0.0, probes_Qp)
        rows_P = np.repeat(np.arange(len(queries), dtype=np.int32), np.diff(limits.astype(np.int64)))
        yield self._pair_list(queries, rule, rows_P, ids_P.astype(np.int64), above_P + radius_Q[rows_P])

    def exact(self, queries: Queries, rows_P: npt.NDArray[np.int32], ids_P: Ids) -> Ids:
        return exact_similarity(queries.features, rows_P, self.prepared, ids_P)

    def _probes(self, queries_QD: Floats) -> Ids:
        return nearest_cells(queries_QD, self.cells.centroids_CD, self.cells.num_probes)

    def _lower_bounds(self, queries_QD: Floats, probes_Qp: Ids, k: int) -> Floats:
        """Scores that `k` images reach: from a first few of the cells, or from all where these hold too few images."""
        first = max(1, self.cells.num_probes // FIRST_PROBES_SHARE)
        bounds_Q = self._kth_scores(queries_QD, probes_Qp[:, :first], k)
        open_Q = np.flatnonzero(np.isinf(bounds_Q))
        if len(open_Q) and first < self.cells.num_probes:
            bounds_Q[open_Q] = self._kth_scores(queries_QD[open_Q], probes_Qp[open_Q], k)
        return bounds_Q

    def _kth_scores(self, queries_QD: Floats, probes_Qp: Ids, k: int) -> Floats:
        """The k-th highest score in the given cells, -inf where they hold fewer."""
        queries_QE = np.column_stack([queries_QD, np.zeros(len(queries_QD), np.float32)])
        self._index.nprobe = probes_Qp.shape[1]
        scores_Qk, ids_Qk = search_preassigned(self._index, queries_QE, k, np.ascontiguousarray(probes_Qp))
        kth_Q: Floats = np.where(ids_Qk[:, k - 1] >= 0, scores_Qk[:, k - 1], -np.inf).astype(np.float32)
        return kth_Q
