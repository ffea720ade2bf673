from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import ArpackNoConvergence, aslinearoperator

from icce_ray.consensus import graph_choice
from icce_ray.consensus.graph_choice import largest_eigenvectors
from icce_ray.consensus.partition import PartitionError


def test_where_the_iteration_finds_none_all_are_computed_or_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise ArpackNoConvergence("no convergence", np.empty(0), np.empty((30, 0)))

    rng = np.random.default_rng(0)
    weights, start_n = rng.normal(size=(30, 30)), rng.uniform(-1, 1, 30)
    graph = csr_matrix(weights + weights.T)
    expected_V, expected_nV = (found[..., -3:] for found in np.linalg.eigh(graph.toarray()))
    for failing in (False, True):
        if failing:
            monkeypatch.setattr(graph_choice, "eigsh", never)
        for matrix in (graph, aslinearoperator(graph)):
            values_V, vectors_nV = largest_eigenvectors(matrix, 3, start_n)
            np.testing.assert_allclose(np.sort(values_V), expected_V, rtol=1e-4)
            np.testing.assert_allclose(np.linalg.svd(vectors_nV.T @ expected_nV)[1], 1, atol=1e-4)
    monkeypatch.setattr(graph_choice, "MAX_DENSE_IMAGES", 29)
    with pytest.raises(PartitionError, match="the eigenvectors were not found: ARPACK error"):
        largest_eigenvectors(graph, 3, start_n)
