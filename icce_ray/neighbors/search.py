"""Cosine search, exact to the last tie: which images are at least so similar, which are the most similar.

FAISS finds the candidates in float32; every pair that stands so close to a border that float32 could get it wrong is
scored again in float64. So the answer does not depend on blocks, threads or the order of the images in memory, and
equals brute force. Similarities are compared at a resolution of 2^-22: closer than that is a tie, and the lower id
wins.

Legend: N images, D feature dimension, Q queries, P pairs, k list length.
"""

from __future__ import annotations

from collections.abc import Iterator

import faiss
import numpy as np
import numpy.typing as npt

from icce_ray.errors import InputError

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

RESOLUTION = 2.0**-22
QUERY_BLOCK = 1024
BASE_BLOCK = 16_384
TIE_SLACK = 16
RESCORED_ELEMENTS = 4_000_000
PREPARED_ELEMENTS = 4_000_000
TIED_QUERY_BLOCK = 64


def prepare(features_ND: npt.NDArray[np.floating], center: bool, out: Floats | None = None) -> Floats:
    """Centre the features and scale each to unit length, so that inner products are cosines.

    Args:
        features_ND: (N, D) floating point; may be a read-only memory map, never written to.
        center: subtract the mean feature (taken in float64) first.
        out: (N, D) float32 to write to, for instance a memory map. Not given: a new array.

    Returns:
        (N, D) float32. An image whose feature is zero (or equals the mean) stays zero: similarity 0 to every image.

    Raises:
        InputError: not a matrix of at least two rows, or a value that is not finite.
    """
    if features_ND.ndim != 2 or features_ND.shape[0] < 2 or features_ND.shape[1] < 1:
        raise InputError(f"features have the shape {features_ND.shape}; needed: at least 2 images x 1 dimension")
    num_images, dim = features_ND.shape
    out = np.empty((num_images, dim), np.float32) if out is None else out
    rows_per_block = max(1, PREPARED_ELEMENTS // dim)
    sum_D = np.zeros(dim)
    for start in range(0, num_images, rows_per_block):
        block = features_ND[start : start + rows_per_block].astype(np.float64)
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise InputError(f"the feature of row {row} is not finite (NaN or infinite); remove or embed it again")
        sum_D += block.sum(axis=0)
    mean_D = sum_D / num_images if center else np.zeros(dim)
    for start in range(0, num_images, rows_per_block):
        block = features_ND[start : start + rows_per_block].astype(np.float64)
        length_before = np.linalg.norm(block, axis=1)
        block -= mean_D
        length = np.linalg.norm(block, axis=1)
        # What centring leaves of an image that equals the mean is rounding: normalising it would invent a direction.
        is_zero = length <= 1e-12 * np.maximum(length_before, np.linalg.norm(mean_D))
        block /= np.where(is_zero, 1.0, length)[:, None]
        block[is_zero] = 0.0
        out[start : start + rows_per_block] = block
    return out


def set_threads(num_threads: int) -> None:
    """Threads of every later search in this process. Ray's OMP_NUM_THREADS is not reliable for FAISS, so set it."""
    faiss.omp_set_num_threads(num_threads)


def similarity_error(dim: int) -> float:
    """Bound on the error of a float32 inner product of unit vectors, with the resolution of comparisons added."""
    return dim * 2.0**-23 + 2 * RESOLUTION


def exact_similarity(base_ND: Floats, rows_P: Ids, columns_P: Ids) -> Ids:
    """Cosine of each pair of rows, in units of `RESOLUTION`, from float64 products: (P,) int64."""
    units_P = np.empty(len(rows_P), np.int64)
    step = max(1, RESCORED_ELEMENTS // base_ND.shape[1])
    for start in range(0, len(rows_P), step):
        chunk = slice(start, start + step)
        left = base_ND[rows_P[chunk]].astype(np.float64)
        left *= base_ND[columns_P[chunk]]
        units_P[chunk] = np.rint(left.sum(axis=1) / RESOLUTION)
    return units_P


def pairs_above(base_ND: Floats, start: int, stop: int, threshold: float) -> Iterator[tuple[Ids, Ids]]:
    """All pairs (i, j) with start <= i < stop, any j but i, and cosine >= `threshold`.

    Args:
        base_ND: (N, D) as `prepare` returns it.
        start, stop: the query rows; memory grows with their number times `BASE_BLOCK` at worst.
        threshold: the floor on the cosine.

    Yields:
        For one block of columns after the other: rows (P,) and columns (P,), int64, rows ascending.
    """
    num_images, dim = base_ND.shape
    queries_QD = np.ascontiguousarray(base_ND[start:stop])
    margin = similarity_error(dim)
    threshold_units = round(threshold / RESOLUTION)
    for base_start in range(0, num_images, BASE_BLOCK):
        block_BD = np.ascontiguousarray(base_ND[base_start : base_start + BASE_BLOCK])
        lengths_Q, scores_P, columns_P = _range_search(queries_QD, block_BD, threshold - margin)
        rows_P = np.repeat(np.arange(start, stop), lengths_Q)
        columns_P += base_start
        keep_P = rows_P != columns_P
        close_P = np.flatnonzero(keep_P & (scores_P < threshold + margin))
        keep_P[close_P] = exact_similarity(base_ND, rows_P[close_P], columns_P[close_P]) >= threshold_units
        yield rows_P[keep_P], columns_P[keep_P]


def most_similar(base_ND: Floats, queries_Q: Ids, k: int) -> tuple[Floats, Ids]:
    """The `k` most similar images of each query image, itself left out.

    Args:
        base_ND: (N, D) as `prepare` returns it.
        queries_Q: row numbers of the query images.
        k: list length; at most N - 1 are returned.

    Returns:
        similarities (Q, min(k, N-1)) float32 (good to float32) and ids (same shape) int64, the most similar first.
        Which ids are in is exact; where similarities tie at the end of the list, the lower ids are in.
    """
    k = min(k, len(base_ND) - 1)
    similarities_Qk = np.zeros((len(queries_Q), k), np.float32)
    ids_Qk = np.empty((len(queries_Q), k), np.int64)
    for start in range(0, len(queries_Q), QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        _most_similar_block(base_ND, queries_Q[block], similarities_Qk[block], ids_Qk[block])
    return similarities_Qk, ids_Qk


def _most_similar_block(base_ND: Floats, queries_Q: Ids, similarities_Qk: Floats, ids_Qk: Ids) -> None:
    num_images, dim = base_ND.shape
    k = ids_Qk.shape[1]
    if k == 0:
        return
    margin = 2 * similarity_error(dim)
    queries_QD = np.ascontiguousarray(base_ND[queries_Q])
    num_found = min(num_images, k + 1 + TIE_SLACK)
    scores_QC, ids_QC = faiss.knn(queries_QD, base_ND, num_found, metric=faiss.METRIC_INNER_PRODUCT)
    # The image itself goes to the end of its row. With many duplicates of it, it may not be in the row at all.
    is_self_QC = ids_QC == queries_Q[:, None]
    order_QC = np.argsort(is_self_QC, axis=1, kind="stable")
    scores_QC = np.take_along_axis(scores_QC, order_QC, axis=1)
    ids_QC = np.take_along_axis(ids_QC, order_QC, axis=1)
    num_valid_Q = num_found - is_self_QC.sum(axis=1)
    scores_QC[np.arange(num_found) >= num_valid_Q[:, None]] = -np.inf
    border_Q = scores_QC[:, k - 1]
    last_Q = scores_QC[np.arange(len(queries_Q)), num_valid_Q - 1]

    is_close_QC = np.abs(scores_QC - border_Q[:, None]) <= margin
    num_safe_Q = (scores_QC > border_Q[:, None] + margin).sum(axis=1)
    # Ties may go on beyond what was found: then all columns have to be seen.
    is_open_Q = (last_Q >= border_Q - margin) & (num_found < num_images)
    is_zero_Q = ~queries_QD.any(axis=1)
    has_choice_Q = (num_safe_Q + is_close_QC.sum(axis=1) > k) & ~is_open_Q & ~is_zero_Q

    key_QC = np.where(is_close_QC, 0, np.where(scores_QC > border_Q[:, None], np.int64(2**62), np.int64(-(2**62))))
    row_P, column_P = np.nonzero(is_close_QC & has_choice_Q[:, None])
    key_QC[row_P, column_P] = exact_similarity(base_ND, queries_Q[row_P], ids_QC[row_P, column_P])
    chosen = np.flatnonzero(has_choice_Q)
    order_QC = np.lexsort((ids_QC[chosen], -key_QC[chosen]), axis=1)[:, :k]
    # Back to the order of the scores, which the safe ones (all of one key) lost.
    order_QC.sort(axis=1)
    similarities_Qk[:] = scores_QC[:, :k]
    ids_Qk[:] = ids_QC[:, :k]
    similarities_Qk[chosen] = np.take_along_axis(scores_QC[chosen], order_QC, axis=1)
    ids_Qk[chosen] = np.take_along_axis(ids_QC[chosen], order_QC, axis=1)

    for query in np.flatnonzero(is_zero_Q):
        ids_Qk[query] = np.delete(np.arange(k + 1), min(k, queries_Q[query]))
        similarities_Qk[query] = 0.0
    tied = np.flatnonzero(is_open_Q & ~is_zero_Q)
    for start in range(0, len(tied), TIED_QUERY_BLOCK):
        block = tied[start : start + TIED_QUERY_BLOCK]
        similarities_Qk[block], ids_Qk[block] = _resolve_ties(base_ND, queries_Q[block], border_Q[block], k)


def _resolve_ties(base_ND: Floats, queries_Q: Ids, border_Q: Floats, k: int) -> tuple[Floats, Ids]:
    """The `k` most similar where more columns tie at the border than a top list holds, by looking at all columns."""
    num_images, dim = base_ND.shape
    floor_Q1 = (border_Q - 2 * similarity_error(dim))[:, None]
    found: list[tuple[Ids, Ids]] = []
    for base_start in range(0, num_images, BASE_BLOCK):
        scores_QB = base_ND[queries_Q] @ base_ND[base_start : base_start + BASE_BLOCK].T
        row_P, column_P = np.nonzero(scores_QB >= floor_Q1)
        found.append((row_P, column_P + base_start))
    row_P = np.concatenate([rows for rows, _ in found])
    column_P = np.concatenate([columns for _, columns in found])
    is_other_P = queries_Q[row_P] != column_P
    row_P, column_P = row_P[is_other_P], column_P[is_other_P]
    units_P = exact_similarity(base_ND, queries_Q[row_P], column_P)
    order_P = np.lexsort((column_P, -units_P, row_P))
    first_Q = np.searchsorted(row_P[order_P], np.arange(len(queries_Q)))
    pick_Qk = order_P[first_Q[:, None] + np.arange(k)]
    return (units_P[pick_Qk] * RESOLUTION).astype(np.float32), column_P[pick_Qk]


def _range_search(queries_QD: Floats, block_BD: Floats, radius: float) -> tuple[Ids, Floats, Ids]:
    """Hits per query (Q,), and of all hits, query after query, the inner product and the column."""
    num_queries, dim = queries_QD.shape
    result = faiss.RangeSearchResult(num_queries)
    query_pointer, base_pointer = faiss.swig_ptr(queries_QD), faiss.swig_ptr(block_BD)
    faiss.range_search_inner_product(query_pointer, base_pointer, dim, num_queries, len(block_BD), radius, result)
    limits = faiss.rev_swig_ptr(result.lims, num_queries + 1).astype(np.int64)
    if limits[-1] == 0:
        return np.diff(limits), np.empty(0, np.float32), np.empty(0, np.int64)
    scores_P = faiss.rev_swig_ptr(result.distances, int(limits[-1])).copy()
    columns_P = faiss.rev_swig_ptr(result.labels, int(limits[-1])).astype(np.int64)
    return np.diff(limits), scores_P, columns_P
