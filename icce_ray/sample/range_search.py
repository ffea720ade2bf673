"""All pairs of rows whose inner product is above 0, by FAISS."""

from __future__ import annotations

import faiss
import numpy as np

from icce_ray.sample.unit_features import Floats, Ids


def range_search(queries_QD: Floats, base_nD: Floats) -> tuple[Ids, Ids, Floats]:
    """Number of pairs of each query (Q,), and for all pairs, query by query, the row of the base and the inner product.
    To find inner products above a radius, add a column: minus the radius to the queries, 1 to the base.

    Args:
        queries_QD, base_nD: C-contiguous.
    """
    num_queries, dim = queries_QD.shape
    result = faiss.RangeSearchResult(num_queries)
    query_pointer, base_pointer = faiss.swig_ptr(queries_QD), faiss.swig_ptr(base_nD)
    faiss.range_search_inner_product(query_pointer, base_pointer, dim, num_queries, len(base_nD), 0.0, result)
    limits = faiss.rev_swig_ptr(result.lims, num_queries + 1).astype(np.int64)
    if limits[-1] == 0:
        return np.diff(limits), np.empty(0, np.int64), np.empty(0, np.float32)
    columns_P = faiss.rev_swig_ptr(result.labels, int(limits[-1])).astype(np.int64)
    products_P = faiss.rev_swig_ptr(result.distances, int(limits[-1])).copy()
    return np.diff(limits), columns_P, products_P
