from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from icce_ray.consensus.contingency import count_consensus, count_pairs
from icce_ray.consensus.label_matrix import encode_heads
from icce_ray.metrics.nmi import anmi, anmi_from_counts, entropy, mutual_information, nmi_from_counts


def plain_nmi(a_N, b_N):
    """Strehl & Ghosh, equation 3, in plain loops."""
    n = len(a_N)
    information = 0.0
    for a in set(a_N):
        for b in set(b_N):
            both = sum(x == a and y == b for x, y in zip(a_N, b_N, strict=True)) / n
            if both:
                information += both * np.log(both / ((np.mean(a_N == a)) * (np.mean(b_N == b))))
    entropies = [-sum(np.mean(v == c) * np.log(np.mean(v == c)) for c in set(v)) for v in (a_N, b_N)]
    return information / np.sqrt(entropies[0] * entropies[1])


@given(seed=st.integers(0, 10_000), num_a=st.integers(1, 6), num_b=st.integers(1, 6), n=st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_nmi_equals_scikit_learn_for_both_means(seed, num_a, num_b, n):
    rng = np.random.default_rng(seed)
    a_N, b_N = rng.integers(0, num_a, n), rng.integers(0, num_b, n)
    table = count_pairs(a_N, b_N, num_a, num_b)
    for mean in ("geometric", "arithmetic"):
        expected = normalized_mutual_info_score(a_N, b_N, average_method=mean)
        assert nmi_from_counts(table, mean) == pytest.approx(expected, abs=1e-12)
        assert nmi_from_counts(table.toarray(), mean) == pytest.approx(expected, abs=1e-12)
    assert mutual_information(table) == pytest.approx(mutual_info_score(a_N, b_N), abs=1e-12)


def test_nmi_equals_the_formula_written_out():
    rng = np.random.default_rng(3)
    a_N, b_N = rng.integers(0, 4, 60), rng.integers(0, 3, 60)
    assert nmi_from_counts(count_pairs(a_N, b_N, 4, 3)) == pytest.approx(plain_nmi(a_N, b_N), abs=1e-12)


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
    assert anmi_from_counts(count_consensus(labels_N, heads, 4), heads.offsets) == pytest.approx(expected, abs=1e-12)


def test_entropy_of_nothing_and_of_one_cluster_is_zero_and_of_even_clusters_the_logarithm():
    assert entropy(np.array([0, 0])) == 0.0
    assert entropy(np.array([7, 0])) == 0.0
    assert entropy(np.array([5, 5, 5, 0])) == pytest.approx(np.log(3))
