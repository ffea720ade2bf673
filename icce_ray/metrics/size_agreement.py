"""How far clusterings agree about sizes: whether these are a property of the images (docs/METHOD.md, "Balance")."""

from typing import Any

import numpy as np
import numpy.typing as npt

MIN_SIZE_AGREEMENT = 0.3
"""Below this, different sizes are taken for accidents of each clustering."""
MAX_IMAGES = 4096
"""Number of images that are compared, if there are more."""


def size_agreement(labels_HN: npt.NDArray[np.integer[Any]]) -> float:
    """How far H clusterings agree which of N images lie in large clusters, -1 to 1: the mean over pairs of the
    correlation of the logarithms of the sizes of the images' clusters. One with equal clusters counts 0. 1 for a single
    one."""
    num_heads = len(labels_HN)
    if num_heads == 1:
        return 1.0
    counted = [np.unique(labels_N, return_inverse=True, return_counts=True) for labels_N in labels_HN]
    logs_HN = np.stack([np.log(sizes_K)[clusters_N] for _, clusters_N, sizes_K in counted])
    logs_HN -= logs_HN.mean(axis=1, keepdims=True)
    norm_H1 = np.linalg.norm(logs_HN, axis=1, keepdims=True)
    unit_HN = np.divide(logs_HN, norm_H1, out=np.zeros_like(logs_HN), where=norm_H1 > 1e-9)
    products = (unit_HN.sum(axis=0) ** 2).sum() - (unit_HN**2).sum()
    # Rounded, since workers on other processors may compute the last bits differently, and all must decide alike.
    return round(float(products) / (num_heads * (num_heads - 1)), 6)
