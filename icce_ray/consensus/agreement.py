"""Agreement of the heads with the consensus, per image (docs/METHOD.md, "Agreement").

Shape letters: N images, n images of a part, H heads, C head clusters, K clusters of the consensus.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from icce_ray.consensus.aligned_vote import align_heads
from icce_ray.consensus.label_matrix import Heads, Labels, count_labels
from icce_ray.consensus.votes import rank_votes
from icce_ray.metrics.contingency import count_table

MAX_CONFUSED_WITH = 3


class Agreement(NamedTuple):
    """Votes of the heads for each image, after they are aligned to the consensus."""

    agreement_N: npt.NDArray[np.float32]
    """Share of the heads with a label whose aligned label is the consensus."""
    vote_entropy_N: npt.NDArray[np.float32]
    """Entropy of the aligned labels, in nats."""
    second_choice_N: Labels
    """The cluster with the most votes besides the consensus; -1 if no head votes for another."""


def measure_agreement(labels_N: Labels, heads: Heads, counts_KC: npt.NDArray[Any], *, seed: int) -> Agreement:
    """Agreement of the heads with the consensus.

    Args:
        labels_N: (N,) integers 0..K-1, the consensus.
        counts_KC: the counts of the consensus against the head clusters.
    """
    cluster_of_column = align_heads(counts_KC, heads.offsets)
    parts = heads.map(_measure_part, heads.image_parts(), labels_N, cluster_of_column, seed)
    return Agreement(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _measure_part(
    heads: Heads, start: int, stop: int, labels_N: Labels, cluster_of_column: Labels, seed: int
) -> Agreement:
    votes_nH, own_n = heads.read(start, stop).votes(cluster_of_column), labels_N[start:stop]
    agreement_n = (votes_nH == own_n[:, None]).sum(axis=1) / (votes_nH >= 0).sum(axis=1)
    ranked_n2, _, entropy_n = rank_votes(votes_nH, 2, seed=seed)
    second_n = np.where(ranked_n2[:, 0] == own_n, ranked_n2[:, 1], ranked_n2[:, 0])
    return Agreement(agreement_n.astype(np.float32), entropy_n.astype(np.float32), second_n)


def describe_clusters(
    labels_N: Labels, agreement_N: npt.NDArray[np.float32], second_choice_N: Labels, num_clusters: int
) -> list[dict[str, Any]]:
    """Each cluster, JSON-able: `cluster`, `size` in images, `mean_agreement` (None if it is empty), and
    `confused_with`: the clusters that are most often the second choice of its images, with the share of its images."""
    sizes_K = count_labels(labels_N, num_clusters)
    labelled = labels_N >= 0
    sums_K = np.bincount(labels_N[labelled], weights=agreement_N[labelled], minlength=num_clusters)
    agreement_K = sums_K / np.maximum(sizes_K, 1)
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
