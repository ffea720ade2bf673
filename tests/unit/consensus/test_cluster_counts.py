from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from icce_ray.consensus.cluster_counts import anmi, count_consensus
from icce_ray.consensus.label_matrix import HeadLabels, encode_heads
from icce_ray.metrics.contingency import count_table


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
