from __future__ import annotations

import numpy as np
import pytest

from icce_ray.neighbors.graph import NeighborGraph


@pytest.fixture
def planted() -> tuple[np.ndarray, NeighborGraph, np.ndarray]:
    """Four overlapping Gaussian clusters of 50 images each in 12 dimensions, and neighbours from the true clusters."""
    generator = np.random.default_rng(3)
    labels = np.repeat(np.arange(4), 50)
    centres = generator.normal(size=(4, 12)) * 2
    features = (centres[labels] + generator.normal(size=(200, 12))).astype(np.float32)
    rows = []
    for image, label in enumerate(labels):
        others = np.flatnonzero((labels == label) & (np.arange(200) != image))
        rows.append(np.sort(generator.choice(others, size=5 + image % 7, replace=False)))
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return features, NeighborGraph(indptr, np.concatenate(rows).astype(np.int32)), labels
