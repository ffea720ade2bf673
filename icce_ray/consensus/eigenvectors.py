"""The largest eigenvectors of a large graph.

Shape letters: n images, V eigenvectors.
"""

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from icce_ray.consensus.partition import PartitionError

Floats = npt.NDArray[np.float64]

TOLERANCE = 1e-5
"""Relative error of the eigenvalues."""
MAX_DENSE_IMAGES = 5_000
"""Up to so many images, all eigenvectors are computed if the iteration doesn't find the largest: some minutes."""


def largest_eigenvectors(graph: csr_matrix | LinearOperator, number: int, start_n: Floats) -> tuple[Floats, Floats]:
    """The largest eigenvalues of a symmetric matrix (V,), in any order, and their eigenvectors (n, V). The iteration
    begins with `start_n`. Raises PartitionError: they weren't found."""
    try:
        values_V, vectors_nV = eigsh(graph, k=number, which="LA", v0=start_n, tol=TOLERANCE)
    except ArpackNoConvergence as error:
        if len(start_n) > MAX_DENSE_IMAGES:
            raise PartitionError(f"the eigenvectors were not found: {error}") from error
        values_V, vectors_nV = np.linalg.eigh(graph @ np.identity(len(start_n)))
    return values_V[-number:], vectors_nV[:, -number:]
