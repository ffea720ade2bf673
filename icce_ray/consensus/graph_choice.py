"""Makes clusterings with the neighbour graph and chooses which one is kept (docs/METHOD.md, "Choice on the graph")."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from icce_ray.consensus.label_matrix import Heads, Labels, anmi
from icce_ray.consensus.neighbor_score import NeighborScore, Shares
from icce_ray.consensus.partition import PartitionError
from icce_ray.consensus.recombination import recombine
from icce_ray.consensus.spectral_cut import MIN_SHARE, replace_loose_clusters, spectral_cut
from icce_ray.metrics.contingency import MAX_SIZED_IMAGES, MIN_SIZE_AGREEMENT, size_agreement

RECOMBINED, SPECTRAL = "recombined", "spectral"
"""Names of the results that the graph takes part in: the best recombination of all others, and its cut."""
MAX_LEAVING = 0.06
"""The graph is a good witness if at most this share of its weight leaves the clusters that hold together."""
MAX_LEFT_BY_CUT = 0.75
"""The cut is preferred if at most this part of what leaves the clusters of the others leaves its own."""

LOSS_MARGIN = 0.05
"""Heads whose loss lies farther above the lowest are left out where heads agree on sizes."""


class GraphChoice(NamedTuple):
    """Clusterings that the graph took part in, by method, and the choice among all."""

    made: dict[str, Labels]
    scores: dict[str, float]
    """By method, of the consensuses too: the share of a cluster's weight that stays within it, in the mean over
    clusters."""
    chosen: str
    skipped: dict[str, str]


def choose_on_graph(
    score: NeighborScore,
    consensuses: dict[str, Labels],
    best: str,
    num_clusters: int,
    *,
    seed: int,
    losses_H: npt.NDArray[np.float64] | None = None,
) -> GraphChoice:
    """`consensuses`: labels (N,) 0..num_clusters-1 by method; `best`: the one with the highest ANMI."""
    recombined_N = recombine(score, [consensuses[best], *consensuses.values()], num_clusters, seed=seed).labels_N
    made, skipped = {RECOMBINED: recombined_N}, {}
    (shares_K,) = score.shares([recombined_N], num_clusters)
    agree, is_good = _agree_on_sizes(score.heads), _is_good_witness(shares_K)
    try:
        if not is_good:
            raise PartitionError(f"over {MAX_LEAVING:.0%} of the edges leave the clusters")
        made[RECOMBINED] = replace_loose_clusters(score, recombined_N, shares_K)
        if not agree:
            raise PartitionError("the heads don't agree which clusters are large")
        made[SPECTRAL] = spectral_cut(score, len(np.unique(consensuses[best])), seed=seed)
    except PartitionError as error:
        skipped[SPECTRAL] = str(error)
    scores = score.mean_shares([*consensuses.values(), *made.values()], num_clusters)
    by_method = dict(zip((*consensuses, *made), scores, strict=True))
    chosen = best_score(by_method, best) if is_good else RECOMBINED if agree else best
    if losses_H is not None and not is_good and not agree:
        head = score.heads.select([int(np.nan_to_num(losses_H, nan=np.inf).argmin())])
        chosen = max(best, RECOMBINED, key=lambda method: anmi((consensuses | made)[method], head, num_clusters))
    return GraphChoice(made, by_method, chosen, skipped)


def trusted_heads(heads: Heads, losses_H: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The heads whose loss is near the lowest, at least half; all, if they don't agree on sizes or leave out images."""
    order = np.argsort(losses_H, kind="stable")  # NaN is last
    near = order[: max(-(-len(order) // 2), int((losses_H <= losses_H[order[0]] + LOSS_MARGIN).sum()))]
    labels_all = heads.head_cluster_sizes().sum() == heads.num_heads * heads.num_images
    return np.sort(near if labels_all and _agree_on_sizes(heads) else order)


def best_score(scores: dict[str, float], best: str) -> str:
    """The higher one of `best` and the recombination, or the cut, if that has a clear lead."""
    chosen = max(best, RECOMBINED, key=scores.__getitem__)
    if SPECTRAL in scores and 1 - scores[SPECTRAL] <= MAX_LEFT_BY_CUT * (1 - scores[chosen]):
        return SPECTRAL
    return chosen


def _is_good_witness(shares_K: Shares) -> bool:
    firm = np.sort(shares_K[shares_K >= MIN_SHARE])
    return len(firm) > 0 and 1 - float(firm.mean()) <= MAX_LEAVING


def _agree_on_sizes(heads: Heads) -> bool:
    compared_n = np.linspace(0, heads.num_images - 1, min(heads.num_images, MAX_SIZED_IMAGES)).astype(np.int64)
    labels_Hn = np.stack([heads.labels_of(head)[compared_n] for head in range(heads.num_heads)])
    return size_agreement(labels_Hn) >= MIN_SIZE_AGREEMENT
