"""Images for the clusters that a consensus function left empty (docs/METHOD.md, "Choice of the consensus").

Shape letters: N images, n images of a part, r of those in clusters that may be split, H heads, C head clusters, K
clusters of the consensus, R ranks, M splits.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.special import xlogy

from icce_ray.consensus.label_matrix import Counts, HeadLabels, Heads, Labels, count_consensus
from icce_ray.metrics.contingency import entropy, mutual_information

Floats = npt.NDArray[np.float64]
Split = tuple[int, int]
"""A cluster of the consensus, and the head cluster whose images are taken out of it."""

NUM_RANKS = 3
"""A head offers so many splits of a cluster: its second to fourth largest cells in the cluster's row of the counts."""
MAX_COUNTED, MIN_SPLITS = 1 << 22, 16
"""Number of splits times head clusters that are counted at a time, and the least number of splits."""
FILLED_SHARE = 4
"""One of so many empty clusters is filled for each time that splits are counted, but at least one."""


def fill_empty_clusters(labels_N: Labels, heads: Heads, num_clusters: int) -> tuple[Labels, int]:
    """The labels (N,) with every cluster 0..num_clusters-1 used if enough images differ in their labels, and how many
    clusters were empty.

    An empty cluster gets the images that one head separates from the rest of their cluster; among all such splits, the
    one that leaves the highest ANMI. If there are too many to count, only those of the highest estimated gain.
    """
    empty = np.flatnonzero(np.bincount(labels_N, minlength=num_clusters) == 0).tolist()
    if not empty:
        return labels_N, 0
    num_empty = len(empty)
    table = _Table(count_consensus(labels_N, heads, num_clusters), heads.offsets)
    labels_N = labels_N.copy()
    counted: dict[Split, Counts] = {}
    while empty and (splits := table.promising_splits()):
        counted |= _count_splits([split for split in splits if split not in counted], labels_N, heads)
        # Counting reads all labels. So if many clusters are empty, some are filled at a time, from different clusters.
        for _ in range(max(1, len(empty) // FILLED_SHARE)):
            splits = [split for split in splits if split in counted]
            if not splits:
                break
            values_M = table.anmi_after(splits, np.array([counted[split] for split in splits]))
            cluster, column = splits[int(values_M.argmax())]
            head = int(np.searchsorted(heads.offsets, column, side="right")) - 1
            codes_N = heads.codes_of(head)
            target = empty.pop(0)
            labels_N[(labels_N == cluster) & (codes_N == column - heads.offsets[head])] = target
            table.split(cluster, target, counted[cluster, column])
            counted = {split: counts_C for split, counts_C in counted.items() if split[0] != cluster}
    return labels_N, num_empty


class _Table:
    """The counts of the consensus, and the ANMI that it would have if a cluster were split.

    With f(x) = x log x, the mutual information with a head is a sum of f over the cells of their table less that over
    its rows and columns, so a split changes the terms of one row only.
    """

    def __init__(self, counts_KC: npt.NDArray[Any], offsets: Counts) -> None:
        self.counts_KC, self.offsets = counts_KC, offsets
        tables = [counts_KC[:, start:stop] for start, stop in pairwise(offsets)]
        self.sizes_KH = np.stack([table.sum(axis=1, dtype=np.int64) for table in tables], axis=1)
        self.images_H = self.sizes_KH.sum(axis=0)
        self.information_H = np.array([mutual_information(table) for table in tables])
        self.entropy_H = np.array([entropy(sizes_K) for sizes_K in self.sizes_KH.T])
        self.head_entropy_H = np.array([entropy(table.sum(axis=0)) for table in tables])
        self.cells_KHR = np.zeros((*self.sizes_KH.shape, NUM_RANKS), dtype=np.int64)
        self.columns_KHR = np.zeros_like(self.cells_KHR)
        self._rank_cells(np.arange(len(counts_KC)))

    def _rank_cells(self, clusters_k: npt.NDArray[np.int64]) -> None:
        for head, (start, stop) in enumerate(pairwise(self.offsets)):
            counts_kc = self.counts_KC[clusters_k, start:stop]
            ranked_kR = np.argsort(-counts_kc, axis=1, kind="stable")[:, 1 : 1 + NUM_RANKS]
            ranks = slice(ranked_kR.shape[1])
            self.cells_KHR[clusters_k, head, ranks] = np.take_along_axis(counts_kc, ranked_kR, axis=1)
            self.columns_KHR[clusters_k, head, ranks] = start + ranked_kR

    def promising_splits(self) -> list[Split]:
        """Those with the highest estimated gain, ordered by cluster and head cluster.

        What a split gains with its own head is known. Each other head is taken to gain as much, but no more than by its
        own best split of the cluster: where a group is real, other heads see it too.
        """
        rest_KHR = self.sizes_KH[:, :, None] - self.cells_KHR
        parted_KHR = _f(self.sizes_KH)[:, :, None] - _f(self.cells_KHR) - _f(rest_KHR)
        gain_KHR = self._nmi(parted_KHR / self.images_H[:, None]) - self._nmi(np.zeros((len(self.images_H), 1)))
        estimate_KHR = sum(np.minimum(gain_KHR, best_K[:, None, None]) for best_K in gain_KHR.max(axis=2).T)
        usable = np.flatnonzero(self.cells_KHR)
        num_splits = max(MIN_SPLITS, MAX_COUNTED // self.counts_KC.shape[1])
        order = np.argsort(-np.asarray(estimate_KHR).ravel()[usable], kind="stable")
        chosen = usable[order[:num_splits]]
        clusters, columns = chosen // self.cells_KHR[0].size, self.columns_KHR.ravel()[chosen]
        return sorted(zip(clusters.tolist(), columns.tolist(), strict=True))

    def _nmi(self, parted_H1: Floats) -> Floats:
        """NMI (..., H, 1) if the entropy of the consensus and its mutual information with the head rise by
        `parted_H1`."""
        columns = (values_H[:, None] for values_H in (self.information_H, self.entropy_H, self.head_entropy_H))
        information_H1, entropy_H1, head_entropy_H1 = columns
        return _normalised(information_H1 + parted_H1, entropy_H1 + parted_H1, head_entropy_H1)

    def anmi_after(self, splits: list[Split], moved_MC: Counts) -> Floats:
        """ANMI (M,) after each split, whose images have the counts `moved_MC` against the head clusters."""
        rows_M = np.array([cluster for cluster, _ in splits])
        information_MH, entropy_MH = self._after(rows_M, moved_MC)
        anmi_M: Floats = _normalised(information_MH, entropy_MH, self.head_entropy_H).mean(axis=1)
        return anmi_M

    def _after(self, rows_M: npt.NDArray[np.int64], moved_MC: Counts) -> tuple[Floats, Floats]:
        cells_MC = _parting(self.counts_KC[rows_M], moved_MC)
        sizes_MH = np.add.reduceat(moved_MC, self.offsets[:-1], axis=1)
        rows_MH = _parting(self.sizes_KH[rows_M], sizes_MH) / self.images_H
        cells_MH = np.add.reduceat(cells_MC, self.offsets[:-1], axis=1) / self.images_H
        return self.information_H + cells_MH - rows_MH, self.entropy_H - rows_MH

    def split(self, cluster: int, target: int, moved_C: Counts) -> None:
        """Move images from a cluster to an empty one."""
        after = self._after(np.array([cluster]), moved_C[None])
        self.information_H, self.entropy_H = (values_1H[0] for values_1H in after)
        moved_H = np.add.reduceat(moved_C, self.offsets[:-1])
        for counts, moved in ((self.counts_KC, moved_C), (self.sizes_KH, moved_H)):
            counts[cluster] -= moved
            counts[target] += moved
        self._rank_cells(np.array([cluster, target]))


def _f(counts: npt.NDArray[Any]) -> Floats:
    values: Floats = xlogy(counts, counts)
    return values


def _parting(whole: npt.NDArray[Any], part: npt.NDArray[Any]) -> Floats:
    return _f(part) + _f(whole - part) - _f(whole)


def _normalised(information: Floats, entropy: Floats, head_entropy: Floats) -> Floats:
    """NMI as `nmi_from_counts` has it: 1 if both have a single cluster, 0 if one of them has."""
    norm = np.sqrt(entropy * head_entropy)
    both_single = np.maximum(entropy, head_entropy) == 0
    return np.where(norm > 0, information / np.where(norm > 0, norm, 1.0), both_single)


def _count_splits(splits: list[Split], labels_N: Labels, heads: Heads) -> dict[Split, Counts]:
    """Counts (C,) of the images that each split takes out, against the head clusters."""
    if not splits:
        return {}
    clusters_M, columns_M = np.array(splits, dtype=np.int64).T
    parts = heads.map(_count_splits_of_part, heads.image_parts(), labels_N, clusters_M, columns_M)
    counts_MC = np.zeros((len(splits), heads.num_head_clusters), dtype=np.int64)
    for part in parts:
        counts_MC += part
    return dict(zip(splits, counts_MC, strict=True))


def _count_splits_of_part(
    heads: Heads, start: int, stop: int, labels_N: Labels, clusters_M: Counts, columns_M: Counts
) -> Counts:
    part, num_columns = heads.read(start, stop), heads.num_head_clusters
    rows_r = np.flatnonzero(np.isin(labels_N[start:stop], clusters_M))
    columns_rH = HeadLabels(part.codes[:, rows_r], part.values).columns()
    places, numbers = np.nonzero(columns_rH >= 0)[0], columns_rH[columns_rH >= 0]
    members = sp.csr_array((np.ones(len(places), np.int64), (places, numbers)), shape=(len(rows_r), num_columns))
    keys_M = clusters_M * num_columns + columns_M  # ascending
    keys = labels_N[start:stop][rows_r[places]].astype(np.int64) * num_columns + numbers
    splits = np.minimum(np.searchsorted(keys_M, keys), len(keys_M) - 1)
    taken = keys_M[splits] == keys
    taken_Mr = sp.csr_array(
        (np.ones(taken.sum(), np.int64), (splits[taken], places[taken])), shape=(len(keys_M), len(rows_r))
    )
    counts_MC: Counts = (taken_Mr @ members).toarray()
    return counts_MC
