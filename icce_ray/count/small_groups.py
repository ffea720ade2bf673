"""What tells of groups that are too small for means over images (docs/METHOD.md, "Number of clusters"): which clusters
recur in other parts, and how much a finer clustering splits off. Pure maths.

Shape letters: n images of the sample, S parts, K clusters.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from icce_ray.metrics.contingency import as_array, count_table

Labels = npt.NDArray[np.integer]

RECURS_FROM = 0.75
"""Jaccard index from which two clusters are the same one. Hennig (2007) calls clusters above it valid and stable."""
FEWEST_IMAGES = 5
"""A smaller cluster of a part may recur by chance; one of a single image always does."""


def recurring_share(labels_Sn: Sequence[Labels], num_clusters: int) -> npt.NDArray[np.float64]:
    """The share of each part's `num_clusters` clusters that recur (S,), 0 to 1: they have FEWEST_IMAGES, and their
    Jaccard index with the most similar cluster of another part is at least RECURS_FROM, in the median of these parts.

    Args:
        labels_Sn: for each of at least two parts, the cluster of each image, -1 if the part leaves it out.
    """
    num_parts = len(labels_Sn)
    best_SSK = np.zeros((num_parts, num_parts, num_clusters))
    for one in range(num_parts):
        for other in range(one):
            jaccard_KK = _jaccard(labels_Sn[one], labels_Sn[other], num_clusters)
            best_SSK[one, other], best_SSK[other, one] = jaccard_KK.max(axis=1), jaccard_KK.max(axis=0)
    shares_S = np.zeros(num_parts)
    for one, labels_n in enumerate(labels_Sn):
        median_K = np.median(np.delete(best_SSK[one], one, axis=0), axis=0)
        sizes_K = np.bincount(labels_n[labels_n >= 0], minlength=num_clusters)
        shares_S[one] = np.mean((median_K >= RECURS_FROM) & (sizes_K >= FEWEST_IMAGES))
    return shares_S


def kept_share(coarse_Sn: Sequence[Labels], fine_Sn: Sequence[Labels]) -> float:
    """The share of images in the largest piece of their coarse cluster when a finer clustering cuts it up, 0 to 1:
    near 1 if only small groups are split off. The median over parts, each clustered both ways."""
    shares_S = []
    for coarse_n, fine_n in zip(coarse_Sn, fine_Sn, strict=True):
        pieces_KL = as_array(count_table(coarse_n, fine_n, int(coarse_n.max()) + 1, int(fine_n.max()) + 1))
        shares_S.append(pieces_KL.max(axis=1).sum() / pieces_KL.sum())
    return float(np.median(shares_S))


def _jaccard(a_n: Labels, b_n: Labels, num_clusters: int) -> npt.NDArray[np.float64]:
    """Images that two clusters share, divided by those in either, of the images that both parts hold (K, K)."""
    shared_KK = as_array(count_table(a_n, b_n, num_clusters, num_clusters))
    either_KK = shared_KK.sum(axis=1, keepdims=True) + shared_KK.sum(axis=0, keepdims=True) - shared_KK
    jaccard_KK: npt.NDArray[np.float64] = shared_KK / np.maximum(either_KK, 1)
    return jaccard_KK
