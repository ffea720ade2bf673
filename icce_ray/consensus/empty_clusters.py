"""Images for the clusters that a consensus function left empty (docs/METHOD.md, "Choice of the consensus").

Shape letters: N images, n images of a part, C head clusters, K clusters of the consensus.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.cluster_counts import count_consensus
from icce_ray.consensus.label_matrix import Counts, Heads, Labels


def fill_empty_clusters(labels_N: Labels, heads: Heads, num_clusters: int) -> tuple[Labels, int]:
    """The labels (N,) with every cluster 0..num_clusters-1 used if enough images differ in their labels, and how many
    clusters were empty.

    An empty cluster gets the largest group of images that one head separates from the rest of their cluster: the second
    largest cell in a cluster's row of the counts against a head.
    """
    empty = np.flatnonzero(np.bincount(labels_N, minlength=num_clusters) == 0)
    if not len(empty):
        return labels_N, 0
    counts_KC = count_consensus(labels_N, heads, num_clusters)
    labels_N = labels_N.copy()
    splits = [_largest_split(counts_C, heads.offsets) for counts_C in counts_KC]
    for target in empty:
        source = max(range(num_clusters), key=lambda cluster: splits[cluster][0])
        size, head, code = splits[source]
        if size == 0:
            break
        for moved, counts_C in heads.map(_images_to_move, heads.image_parts(), labels_N, source, head, code):
            labels_N[moved] = target
            counts_KC[target] += counts_C
            counts_KC[source] -= counts_C
        for cluster in (source, target):
            splits[cluster] = _largest_split(counts_KC[cluster], heads.offsets)
    return labels_N, len(empty)


def _images_to_move(
    heads: Heads, start: int, stop: int, labels_N: Labels, source: int, head: int, code: int
) -> tuple[npt.NDArray[np.int64], Counts]:
    """Images of the consensus cluster `source` that `head` puts into its cluster `code`, and their counts against the
    head clusters (C,)."""
    part = heads.read(start, stop)
    moved_n = np.flatnonzero((labels_N[start:stop] == source) & (part.codes[head] == code))
    codes_Hn = part.codes[:, moved_n]
    columns = (codes_Hn + heads.offsets[:-1, None])[codes_Hn >= 0]
    return start + moved_n, np.bincount(columns, minlength=heads.num_head_clusters)


def _largest_split(counts_C: npt.NDArray[Any], offsets: Counts) -> tuple[int, int, int]:
    """Images in the second largest cell of one head, that head, and its cluster; 0 images if no head splits them."""
    best = (0, 0, 0)
    for head, (start, stop) in enumerate(pairwise(offsets)):
        if stop - start >= 2:
            code = int(np.argsort(-counts_C[start:stop], kind="stable")[1])
            best = max(best, (int(counts_C[start + code]), head, code))
    return best
