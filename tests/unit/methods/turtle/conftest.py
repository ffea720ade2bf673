from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="module")
def planted() -> tuple[list[np.ndarray], np.ndarray]:
    """Three feature sets of 300 images in four clusters, with 24, 10 and 7 dimensions, and the clusters."""
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 4, 300)
    sets = []
    for dim in (24, 10, 7):
        centres = generator.normal(size=(4, dim)) * 2 + 1
        sets.append((centres[labels] + generator.normal(size=(300, dim))).astype(np.float32))
    return sets, labels
