"""Find the clusters of one clustering again in another of the same images."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

MIN_SHARE = 0.5
"""Smallest share of an old cluster's images in the new one that it is taken for."""


def match_clusters(table_KL: npt.NDArray[Any]) -> dict[int, int]:
    """The new cluster of each old one that persists: matched one to one so that most images agree (Kuhn, Naval Research
    Logistics 2, 1955); a match counts if it holds at least MIN_SHARE of the old cluster.

    Args:
        table_KL: images of each old cluster (K) in each new one (L).
    """
    return {
        int(old): int(new)
        for old, new in zip(*linear_sum_assignment(-table_KL), strict=True)
        if 0 < table_KL[old, new] >= MIN_SHARE * table_KL[old].sum()
    }


def largest_share(table_KL: npt.NDArray[Any], sizes_K: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """For each row the column with most of its images, and whether that has at least MIN_SHARE of `sizes_K`."""
    most_K = table_KL.argmax(axis=1)
    counts_K = table_KL[np.arange(len(table_KL)), most_K]
    return most_K, (counts_K > 0) & (counts_K >= MIN_SHARE * sizes_K)
