"""Contingency counts of a consensus with all heads, and its average NMI with them, from the label matrix.

Everything that a consensus needs to know about the images passes through such counts: they add up over images.

Shape letters: N images, H heads, K clusters of the consensus, C head clusters.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.label_matrix import Heads
from icce_ray.metrics.contingency import anmi_from_counts, cell_numbers


def count_consensus(labels_N: npt.NDArray[Any], heads: Heads, num_clusters: int) -> npt.NDArray[Any]:
    """Counts of a labelling against the clusters of all heads: (num_clusters, C) integers, additive over shards.

    They are int32 if the number of images allows it: this is the largest array of a consensus.
    """
    counts_KC = np.zeros((num_clusters, heads.num_head_clusters), dtype=_count_dtype(heads.num_images))
    offsets, parts = heads.offsets, heads.head_parts()
    tables = heads.map(_count_part, parts, labels_N, num_clusters)
    for (_, _, first, end), table in zip(parts, tables, strict=True):
        counts_KC[:, offsets[first] : offsets[end]] += table
    return counts_KC


def _count_part(
    heads: Heads, start: int, stop: int, first: int, end: int, labels_N: npt.NDArray[Any], num_clusters: int
) -> npt.NDArray[Any]:
    part = heads.read(start, stop, slice(first, end))
    table = np.empty((num_clusters, part.num_head_clusters), dtype=_count_dtype(heads.num_images))
    for codes_n, (begin, after) in zip(part.codes, pairwise(part.offsets), strict=True):
        cells_n = cell_numbers(labels_N[start:stop], codes_n, int(after - begin))
        counts = np.bincount(cells_n, minlength=num_clusters * int(after - begin))
        table[:, begin:after] = counts.reshape(num_clusters, -1)
    return table


def _count_dtype(num_images: int) -> type[np.integer[Any]]:
    return np.int32 if num_images < 2**31 else np.int64


def anmi(labels_N: npt.NDArray[Any], heads: Heads, num_clusters: int) -> float:
    """Average NMI (geometric) of a labelling with every head, 0 to 1.

    Args:
        labels_N: (N,) integers 0..num_clusters-1.
        heads: the label matrix. An image without a label from a head is left out of that head's NMI.
    """
    return anmi_from_counts(count_consensus(labels_N, heads, num_clusters), heads.offsets)
