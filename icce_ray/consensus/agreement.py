"""How far the heads agree with the consensus, image by image: the confidence [ours, METHOD section 3].

Shape letters: N images, H heads, C head clusters, K clusters of the consensus.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment

from icce_ray.consensus.cluster_counts import count_consensus, largest_rows
from icce_ray.consensus.label_matrix import MISSING, Counts, Heads, Labels, count_labels
from icce_ray.consensus.votes import block_rows, rank_votes
from icce_ray.metrics.contingency import count_table

MAX_CONFUSED_WITH = 3


@dataclass(frozen=True)
class Agreement:
    """Per image: `agreement` (N,), the share of the heads that gave a label whose aligned label is the consensus;
    `vote_entropy` (N,), of the aligned labels, in nats; `second_choice` (N,), the cluster with most votes besides the
    consensus, -1 where no head votes for another."""

    agreement: npt.NDArray[np.float32]
    vote_entropy: npt.NDArray[np.float32]
    second_choice: Labels


def align_heads(counts_KC: npt.NDArray[Any], offsets: Counts) -> npt.NDArray[np.int32]:
    """Consensus cluster that each head cluster stands for: (C,).

    A head with as many clusters as the consensus is matched one to one so that most images agree (Hungarian); of any
    other head each cluster stands for the consensus cluster that most of its images are in.
    """
    num_clusters = len(counts_KC)
    cluster_of_column = largest_rows(counts_KC)
    for start, stop in pairwise(offsets):
        if stop - start == num_clusters:
            rows, columns = linear_sum_assignment(counts_KC[:, start:stop], maximize=True)
            cluster_of_column[start + columns] = rows
    return cluster_of_column


def measure_agreement(
    labels_N: Labels, heads: Heads, num_clusters: int, *, seed: int, counts_KC: npt.NDArray[Any] | None = None
) -> Agreement:
    """Agreement of the heads with the consensus `labels_N`, (N,) integers 0..num_clusters-1, whose counts against the
    heads are `counts_KC` where they are known already."""
    if counts_KC is None:
        counts_KC = count_consensus(labels_N, heads, num_clusters)
    cluster_of_column = align_heads(counts_KC, heads.offsets)
    pieces = list(heads.map(_measure_piece, heads.image_pieces(), labels_N, cluster_of_column, seed))
    return Agreement(*(np.concatenate(parts) for parts in zip(*pieces, strict=True)))


def _measure_piece(
    heads: Heads, start: int, stop: int, labels_N: Labels, cluster_of_column: Labels, seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Labels]:
    part = heads.read(start, stop)
    agreement_n = np.empty(stop - start, dtype=np.float32)
    entropy_n = np.empty(stop - start, dtype=np.float32)
    second_n = np.empty(stop - start, dtype=np.int32)
    step = block_rows(heads.num_heads)
    for begin in range(0, stop - start, step):
        columns_nH = part.columns(begin, begin + step)
        votes_nH = np.where(columns_nH >= 0, cluster_of_column[columns_nH], np.int32(MISSING))
        block = slice(begin, begin + len(votes_nH))
        own_n = labels_N[start:stop][block]
        agreement_n[block] = (votes_nH == own_n[:, None]).sum(axis=1) / (votes_nH >= 0).sum(axis=1)
        ranked_n2, _, entropy_n[block] = rank_votes(votes_nH, 2, seed=seed)
        second_n[block] = np.where(ranked_n2[:, 0] == own_n, ranked_n2[:, 1], ranked_n2[:, 0])
    return agreement_n, entropy_n, second_n


def describe_clusters(
    labels_N: Labels, agreement_N: npt.NDArray[np.float32], second_choice_N: Labels, num_clusters: int
) -> list[dict[str, Any]]:
    """Per cluster, JSON-able: `cluster`, `size` in images, `mean_agreement` (None where it is empty), and
    `confused_with`, the clusters that are most often the second choice of its images, with the share of its images."""
    sizes_K = count_labels(labels_N, num_clusters)
    agreement_K = np.bincount(labels_N, weights=agreement_N, minlength=num_clusters) / np.maximum(sizes_K, 1)
    seconds = sp.csr_array(count_table(labels_N, second_choice_N, num_clusters, num_clusters))
    described = []
    for cluster, (size, agreement) in enumerate(zip(sizes_K.tolist(), agreement_K.tolist(), strict=True)):
        begin, end = seconds.indptr[cluster], seconds.indptr[cluster + 1]
        others, counts = seconds.indices[begin:end], seconds.data[begin:end]
        most = np.lexsort((others, -counts))[:MAX_CONFUSED_WITH]
        confused = [{"cluster": int(others[i]), "share": float(counts[i] / size)} for i in most]
        mean_agreement = agreement if size else None
        described.append(
            {"cluster": cluster, "size": size, "mean_agreement": mean_agreement, "confused_with": confused}
        )
    return described
