from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from icce_ray.consensus import contingency
from icce_ray.consensus.contingency import count_consensus, count_pairs, largest_rows
from icce_ray.consensus.label_matrix import HeadLabels, count_labels, encode_heads
from icce_ray.errors import InputError

LABELS = hnp.arrays(np.int32, st.integers(1, 60), elements=st.integers(-1, 5))


def plain_counts(a_N, b_N, num_a, num_b):
    table = np.zeros((num_a, num_b), dtype=int)
    for a, b in zip(a_N, b_N, strict=True):
        if a != -1 and b != -1:
            table[a, b] += 1
    return table


@given(a_N=LABELS, seed=st.integers(0, 100))
def test_pair_counts_equal_a_plain_loop(a_N, seed):
    b_N = np.random.default_rng(seed).integers(-1, 4, len(a_N))
    table = count_pairs(a_N, b_N, 6, 4)
    assert table.dtype == np.int64
    np.testing.assert_array_equal(table.toarray(), plain_counts(a_N, b_N, 6, 4))


def test_sparse_and_dense_counting_agree(monkeypatch):
    rng = np.random.default_rng(0)
    a_N, b_N = rng.integers(-1, 50, 400), rng.integers(-1, 70, 400)
    dense = count_pairs(a_N, b_N, 50, 70)
    monkeypatch.setattr(contingency, "MIN_DENSE_CELLS", 0)
    monkeypatch.setattr(contingency, "MAX_DENSE_CELLS_PER_IMAGE", 0)
    sparse = count_pairs(a_N, b_N, 50, 70)
    np.testing.assert_array_equal(dense.toarray(), sparse.toarray())
    np.testing.assert_array_equal(dense.toarray(), plain_counts(a_N, b_N, 50, 70))


@given(cut=st.integers(0, 200))
@settings(max_examples=25)
def test_counts_of_shards_add_up_to_those_of_the_whole(cut):
    rng = np.random.default_rng(1)
    labels_N = rng.integers(0, 5, 200)
    matrix = rng.integers(-1, 6, (3, 200))
    matrix[0] = np.maximum(matrix[0], 0)
    heads = encode_heads(matrix)
    whole = count_consensus(labels_N, heads, 5)
    shards = [
        count_consensus(labels_N[part], HeadLabels(heads.codes[:, part], heads.values), 5)
        for part in (slice(0, cut), slice(cut, None))
    ]
    np.testing.assert_array_equal(shards[0] + shards[1], whole)
    for head, (start, stop) in enumerate(zip(heads.offsets[:-1], heads.offsets[1:], strict=True)):
        expected = plain_counts(labels_N, heads.codes[head], 5, stop - start)
        np.testing.assert_array_equal(whole[:, start:stop], expected)


@given(counts_KC=hnp.arrays(np.int32, st.tuples(st.integers(1, 6), st.integers(0, 9)), elements=st.integers(0, 3)))
def test_the_largest_row_is_the_first_of_equal_ones(counts_KC):
    np.testing.assert_array_equal(largest_rows(counts_KC), counts_KC.argmax(axis=0))


@given(matrix=hnp.arrays(np.int64, (3, 20), elements=st.sampled_from([-1, 0, 2, 7, 5000, 10**9])))
def test_encoding_numbers_clusters_without_gaps_and_keeps_the_values(matrix):
    matrix[0, :] = np.maximum(matrix[0, :], 0)
    matrix[:, 0] = 0
    heads = encode_heads(matrix)
    for row, codes_N, values in zip(matrix, heads.codes, heads.values, strict=True):
        np.testing.assert_array_equal(values, np.unique(row[row >= 0]))
        np.testing.assert_array_equal(codes_N == -1, row == -1)
        np.testing.assert_array_equal(values[codes_N[codes_N >= 0]], row[row >= 0])
    sizes = np.concatenate([count_labels(c, len(v)) for c, v in zip(heads.codes, heads.values, strict=True)])
    np.testing.assert_array_equal(heads.head_cluster_sizes(), sizes)
    assert sizes.min() > 0
    columns_NH = heads.columns()
    np.testing.assert_array_equal(columns_NH[:, 2] >= 0, matrix[2] >= 0)
    assert columns_NH.max() < heads.num_head_clusters


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([0, 1, 2], "two-dimensional"),
        ([[0.0, 1.0]], "float64"),
        ([[True, False]], "bool"),
        ([["a", "b"]], "integers"),
        (np.zeros((0, 3), dtype=int), "at least one head"),
        (np.zeros((3, 0), dtype=int), "at least one head"),
        ([[0, -2]], "-2"),
        ([[0, 1], [-1, -1]], "head 1 has no label"),
        ([[0, -1], [1, -1]], "image 1"),
    ],
)
def test_a_label_matrix_that_cannot_be_used_is_refused_with_its_fault(matrix, message):
    with pytest.raises(InputError, match=message):
        encode_heads(matrix)


def test_unsigned_labels_are_accepted():
    heads = encode_heads(np.array([[0, 255, 0]], dtype=np.uint8))
    np.testing.assert_array_equal(heads.codes, [[0, 1, 0]])
