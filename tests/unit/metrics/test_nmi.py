from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from icce_ray.metrics.contingency import anmi_from_counts, count_table, entropy, mutual_information, nmi_from_counts


def nmi_in_loops(a_N, b_N):
    """Strehl & Ghosh, equation 3, written out."""
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
@settings(max_examples=60)
def test_nmi_equals_scikit_learn_for_both_means(seed, num_a, num_b, n):
    rng = np.random.default_rng(seed)
    a_N, b_N = rng.integers(0, num_a, n), rng.integers(0, num_b, n)
    table = count_table(a_N, b_N, num_a, num_b)
    for mean in ("geometric", "arithmetic"):
        expected = normalized_mutual_info_score(a_N, b_N, average_method=mean)
        assert nmi_from_counts(table, mean) == pytest.approx(expected, abs=1e-12)
        assert nmi_from_counts(sp.csr_array(table), mean) == pytest.approx(expected, abs=1e-12)
    assert mutual_information(table) == pytest.approx(mutual_info_score(a_N, b_N), abs=1e-12)


def test_nmi_equals_the_formula_written_out():
    rng = np.random.default_rng(3)
    a_N, b_N = rng.integers(0, 4, 60), rng.integers(0, 3, 60)
    assert nmi_from_counts(count_table(a_N, b_N, 4, 3)) == pytest.approx(nmi_in_loops(a_N, b_N), abs=1e-12)


def test_anmi_is_the_mean_nmi_of_tables_side_by_side():
    rng = np.random.default_rng(0)
    labels_N, heads_HN = rng.integers(0, 4, 300), rng.integers(0, 5, (3, 300))
    counts_KC = np.concatenate([count_table(labels_N, head_N, 4, 5) for head_N in heads_HN], axis=1)
    expected = np.mean([normalized_mutual_info_score(labels_N, x, average_method="geometric") for x in heads_HN])
    assert anmi_from_counts(counts_KC, np.array([0, 5, 10, 15])) == pytest.approx(expected, abs=1e-12)


def test_entropy_of_nothing_and_of_one_cluster_is_zero_and_of_even_clusters_the_logarithm():
    assert entropy(np.array([0, 0])) == 0.0
    assert entropy(np.array([7, 0])) == 0.0
    assert entropy(np.array([5, 5, 5, 0])) == pytest.approx(np.log(3))
