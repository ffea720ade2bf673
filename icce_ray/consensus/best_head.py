"""The best head, unchanged, as the consensus (docs/METHOD.md, "Choice of the consensus")."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.label_matrix import Heads, Labels
from icce_ray.consensus.partition import PartitionError


def best_head(heads: Heads, num_clusters: int, *, scores_H: npt.NDArray[np.float64]) -> Labels:
    """The labels (N,) of the head with the highest score (NaN is the lowest), in its own numbers if these are
    0..num_clusters-1. Only heads that label every image and have at most that many clusters are considered. Raises
    PartitionError: there is no such head."""
    sizes_C = heads.head_cluster_sizes()
    labelled_H = np.array([sizes_C[start:stop].sum() for start, stop in pairwise(heads.offsets)])
    usable = np.flatnonzero((heads.num_clusters <= num_clusters) & (labelled_H == heads.num_images))
    if not len(usable):
        raise PartitionError(f"no head labels every image with at most {num_clusters} clusters")
    head = int(usable[np.where(np.isnan(scores_H[usable]), -np.inf, scores_H[usable]).argmax()])
    values = heads.values[head]
    codes_N = heads.gather(slice(head, head + 1)).codes[0]
    labels_N: Labels = values[codes_N].astype(np.int32) if values[-1] < num_clusters else codes_N
    return labels_N
