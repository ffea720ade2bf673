from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from icce_ray.metrics import contingency
from icce_ray.metrics.contingency import count_table


def count_in_a_loop(a_N, b_N, num_a, num_b):
    table = np.zeros((num_a, num_b), dtype=np.int64)
    for a, b in zip(a_N, b_N, strict=True):
        if a != -1 and b != -1:
            table[a, b] += 1
    return table


@given(a_N=hnp.arrays(np.int32, st.integers(0, 60), elements=st.integers(-1, 5)), seed=st.integers(0, 100))
def test_counts_equal_a_plain_loop(a_N, seed):
    b_N = np.random.default_rng(seed).integers(-1, 4, len(a_N))
    table = count_table(a_N, b_N, 6, 4)
    assert table.dtype == np.int64
    np.testing.assert_array_equal(table, count_in_a_loop(a_N, b_N, 6, 4))


def test_a_table_far_larger_than_the_labels_is_sparse_with_the_same_counts(monkeypatch):
    rng = np.random.default_rng(0)
    a_N, b_N = rng.integers(-1, 50, 400), rng.integers(-1, 70, 400)
    monkeypatch.setattr(contingency, "MIN_DENSE_CELLS", 50 * 70)
    assert isinstance(count_table(a_N, b_N, 50, 70), np.ndarray)
    monkeypatch.setattr(contingency, "MIN_DENSE_CELLS", 0)
    sparse = count_table(a_N, b_N, 50, 70)
    assert sp.issparse(sparse)
    assert sparse.nnz == np.count_nonzero(sparse.data)
    np.testing.assert_array_equal(sparse.toarray(), count_in_a_loop(a_N, b_N, 50, 70))
