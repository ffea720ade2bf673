from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import normalized_mutual_info_score

from icce_ray.consensus.label_matrix import HeadLabels, anmi, count_consensus, count_labels, encode_heads
from icce_ray.errors import InputError
from icce_ray.metrics.contingency import count_table


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
    ],
)
def test_a_label_matrix_that_cannot_be_used_is_refused_with_its_fault(matrix, message):
    with pytest.raises(InputError, match=message):
        encode_heads(matrix)


def test_images_that_no_head_labels_are_left_out_and_put_back():
    heads = encode_heads([[-1, 0, -1, 5, -1], [-1, -1, -1, 2, 3]])
    np.testing.assert_array_equal(heads.codes, [[0, 1, -1], [-1, 0, 1]])
    np.testing.assert_array_equal(heads.unlabelled, [0, 2])
    np.testing.assert_array_equal(heads.spread(np.array([7, 8, 9]), -1), [-1, 7, -1, 8, 9])


def test_unsigned_labels_are_accepted():
    heads = encode_heads(np.array([[0, 255, 0]], dtype=np.uint8))
    np.testing.assert_array_equal(heads.codes, [[0, 1, 0]])


@given(cut=st.integers(1, 199))
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
        expected = count_table(labels_N, heads.codes[head], 5, int(stop - start))
        np.testing.assert_array_equal(whole[:, start:stop], expected)


def test_anmi_is_the_mean_over_heads_each_on_the_images_it_labels():
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, 4, 300)
    matrix = rng.integers(0, 5, (4, 300))
    matrix[1, rng.random(300) < 0.4] = -1
    heads = encode_heads(matrix)
    expected = np.mean(
        [normalized_mutual_info_score(labels_N[row >= 0], row[row >= 0], average_method="geometric") for row in matrix]
    )
    assert anmi(labels_N, heads, 4) == pytest.approx(expected, abs=1e-12)
