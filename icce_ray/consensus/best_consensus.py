"""The consensus with the highest ANMI of several consensus functions, each refined (docs/METHOD.md, "Choice of the
consensus").

It reads the labels part by part only: the same code makes the consensus of an array and of a matrix on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icce_ray.config import ConsensusConfig, ConsensusMethod
from icce_ray.consensus.aligned_vote import Agreement, align_and_vote, best_head, measure_agreement
from icce_ray.consensus.doubtful_images import UnitRows, find_doubtful, place_doubtful
from icce_ray.consensus.empty_clusters import fill_empty_clusters
from icce_ray.consensus.graph_choice import RECOMBINED, choose_on_graph, trusted_heads
from icce_ray.consensus.graph_cuts import HeadPairs, compare_heads, cspa, hbgf, mcla
from icce_ray.consensus.hierarchy import Hierarchy, build_hierarchy
from icce_ray.consensus.label_matrix import MISSING, Heads, Labels, anmi, count_consensus
from icce_ray.consensus.neighbor_score import Nearest, NeighborScore
from icce_ray.consensus.partition import PartitionError
from icce_ray.consensus.recombination import MAX_CLUSTERS
from icce_ray.consensus.refinement import refine

MAX_SEEDS, MAX_STARTS = 4, 16
"""Maximum number of tries of a function: METIS seeds, and heads that `vote` starts from."""
TRIES_BUDGET = 2_000_000
"""Approximate limit of labels (heads x images) times tries: large inputs get fewer tries, at least one."""
SCREENING_PASSES = 5
"""Refinement passes of each try; only the best try of each function is refined to the end."""
RELABELLED = "relabelled"
"""Name of the step that places doubtful images by their features, among what was skipped."""
FALLBACK: ConsensusMethod = "vote"
"""Used if all functions asked for fail: it needs no partitioner."""


@dataclass(frozen=True)
class EnsembleResult:
    """One clustering of N images, made of H heads.

    ANMI is the average, over the heads that are not left out, of the NMI (geometric mean) with the labels, 0 to 1.
    """

    labels: Labels
    """(N,) int32, 0..K-1; -1 for noise, the images that no head labels."""
    method: str
    """The consensus function that these labels are from: the one with the highest ANMI. With a neighbour graph, that,
    `recombined` or `spectral`."""
    anmi: dict[str, float]
    """ANMI of each function that was tried, after refinement if that is on."""
    start_anmi: dict[str, float]
    """ANMI of each function that was tried, before refinement."""
    consensus_anmi: float
    """ANMI of `labels`."""
    agreement: npt.NDArray[np.float32]
    """(N,), 0 to 1: share of the heads whose aligned label is the consensus; NaN for noise."""
    vote_entropy: npt.NDArray[np.float32]
    """(N,), nats: entropy of the aligned labels of the heads."""
    second_choice: Labels
    """(N,) int32: the cluster with the most votes besides the consensus; -1 if no head votes for another."""
    num_relabelled: int
    """Images that were placed by their features, where most have no majority of the heads."""
    graph_scores: dict[str, float]
    """By method: the share of a cluster's edges in the neighbour graph that stay within it, in the mean over clusters;
    edges weigh as many heads as join their ends. Empty without a graph."""
    hierarchy: Hierarchy
    """The clusters merged step by step, those that the heads confuse most first; `hierarchy.cut(n)` leaves n groups."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Functions that gave no result, and why."""
    repaired: dict[str, int] = field(default_factory=dict)
    """Number of clusters that each function's best try left empty. They were filled if that was possible."""

    def summary(self) -> dict[str, Any]:
        """JSON-able summary: the choice, its agreement with the heads, the sizes of the clusters."""
        has_cluster = self.labels >= 0
        sizes = np.bincount(self.labels[has_cluster])
        sizes = sizes[sizes > 0]
        return {
            "method": self.method,
            "anmi": self.consensus_anmi,
            "anmi_by_method": self.anmi,
            "start_anmi_by_method": self.start_anmi,
            "graph_score_by_method": self.graph_scores,
            "skipped": self.skipped,
            "repaired": self.repaired,
            "mean_agreement": float(self.agreement[has_cluster].mean(dtype=np.float64)),
            "num_relabelled": self.num_relabelled,
            "num_noise": int((~has_cluster).sum()),
            "num_clusters": len(sizes),
            "smallest_cluster": int(sizes.min()),
            "median_cluster": float(np.median(sizes)),
            "largest_cluster": int(sizes.max()),
        }


class _Try(NamedTuple):
    anmi: float
    labels_N: Labels
    num_empty: int
    """Clusters that the function left empty."""


def find_consensus(
    heads: Heads,
    num_clusters: int,
    config: ConsensusConfig,
    *,
    seed: int,
    head_losses: npt.NDArray[np.float64] | None = None,
    nearest: Nearest | None = None,
    unit_features: Callable[[], UnitRows] | None = None,
    report: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> EnsembleResult:
    """Make the consensus of `heads`, with the clusters 0..num_clusters-1. A single head is taken as it is, if it has no
    more clusters. `head_losses` (H,) are for `best_head` and the choice on the neighbour graph, `nearest`; without one,
    the consensus with the highest ANMI is kept. `unit_features` makes the features that place doubtful images; without
    it, these stay where the consensus puts them. `report` is called with the number of finished steps, of all steps,
    and the name of the next one."""
    if heads.num_heads == 1:  # there is nothing to combine
        config = config.model_copy(update={"methods": ("best_head",), "refine": False})
    seeds = derive_seeds(seed)
    recombines = config.recombine and nearest is not None
    total = len(config.methods) + recombines + 1
    everyone = heads
    if recombines and head_losses is not None and heads.num_heads > 2:
        trusted = trusted_heads(heads, head_losses)
        if len(trusted) < heads.num_heads:  # else it would only be copied
            heads, head_losses = heads.select(trusted.tolist()), head_losses[trusted]
    best_tries, start_anmi, skipped = _try_functions(
        heads, num_clusters, config, seeds, head_losses, lambda done, method: report(done, total, method)
    )
    chosen = max(best_tries, key=lambda method: best_tries[method].anmi)
    graph_scores: dict[str, float] = {}
    if recombines and heads.noise:
        skipped[RECOMBINED] = heads.noise
    elif recombines and num_clusters > MAX_CLUSTERS:
        skipped[RECOMBINED] = f"{num_clusters:,} clusters are over the limit of {MAX_CLUSTERS:,}"
    elif recombines and nearest is not None:
        report(len(config.methods), total, "recombination")
        consensuses = {method: one.labels_N for method, one in best_tries.items()}
        score = NeighborScore(heads, nearest)
        made, graph_scores, chosen, left_out = choose_on_graph(
            score, consensuses, chosen, num_clusters, seed=seeds[0], losses_H=head_losses
        )
        best_tries |= {name: _Try(anmi(labels_N, heads, num_clusters), labels_N, 0) for name, labels_N in made.items()}
        skipped |= left_out
    report(total - 1, total, "agreement")
    labels_N, value = best_tries[chosen].labels_N, best_tries[chosen].anmi
    counts_KC, agreement = _compare(labels_N, everyone, num_clusters, seeds[0])
    placed_N = labels_N
    if config.relabel and unit_features is not None and len(doubtful := find_doubtful(agreement.agreement_N)):
        try:
            placed_N = place_doubtful(labels_N, doubtful, everyone, unit_features, num_clusters)
        except PartitionError as error:
            skipped[RELABELLED] = str(error)
    num_relabelled = int((placed_N != labels_N).sum())
    if num_relabelled:
        labels_N, value = placed_N, anmi(placed_N, heads, num_clusters)
        counts_KC, agreement = _compare(labels_N, everyone, num_clusters, seeds[0])
    return EnsembleResult(
        labels=heads.spread(labels_N, MISSING),
        method=chosen,
        anmi={method: best.anmi for method, best in best_tries.items()},
        start_anmi=start_anmi,
        consensus_anmi=value,
        agreement=heads.spread(agreement.agreement_N, np.nan),
        vote_entropy=heads.spread(agreement.vote_entropy_N, 0.0),
        second_choice=heads.spread(agreement.second_choice_N, MISSING),
        num_relabelled=num_relabelled,
        graph_scores=graph_scores,
        hierarchy=build_hierarchy(counts_KC, everyone.offsets),
        skipped=skipped,
        repaired={method: best.num_empty for method, best in best_tries.items() if best.num_empty},
    )


def _compare(labels_N: Labels, heads: Heads, num_clusters: int, seed: int) -> tuple[npt.NDArray[Any], Agreement]:
    """The counts of a consensus against the clusters of the heads (K, C), and how far the heads agree with it."""
    counts_KC = count_consensus(labels_N, heads, num_clusters)
    return counts_KC, measure_agreement(labels_N, heads, counts_KC, seed=seed)


def _try_functions(
    heads: Heads,
    num_clusters: int,
    config: ConsensusConfig,
    seeds: list[int],
    losses_H: npt.NDArray[np.float64] | None,
    report: Callable[[int, str], None],
) -> tuple[dict[str, _Try], dict[str, float], dict[str, str]]:
    """The best try of each function, the highest ANMI before refinement, and the functions that failed, with why. If
    all fail, FALLBACK is tried; raises PartitionError: it fails too."""

    @cache
    def pairs() -> HeadPairs:
        return compare_heads(heads)

    best_tries: dict[str, _Try] = {}
    start_anmi: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for done, method in enumerate((*config.methods, FALLBACK)):
        is_fallback = done == len(config.methods)
        if is_fallback and best_tries:
            break
        report(done, method)
        try:
            labels = _run_method(method, heads, pairs, num_clusters, seeds, config.imbalance, losses_H)
        except PartitionError as error:  # a fault, such as too little memory, ends the run: it must not change labels
            if is_fallback:
                raise
            skipped[method] = str(error)
            continue
        tries = [_fill_and_score(labels_N, heads, num_clusters) for labels_N in labels]
        start_anmi[method] = max(one.anmi for one in tries)
        best_tries[method] = _best_refined(tries, heads, num_clusters) if config.refine else _best(tries)
    return best_tries, start_anmi, skipped


def _run_method(
    method: ConsensusMethod,
    heads: Heads,
    pairs: Callable[[], HeadPairs],
    num_clusters: int,
    seeds: list[int],
    imbalance: float,
    losses_H: npt.NDArray[np.float64] | None,
) -> list[Labels]:
    num_tries = max(1, TRIES_BUDGET // (heads.num_heads * heads.num_images))
    match method:
        case "best_head":
            return [best_head(heads, num_clusters, scores_H=pairs().anmi() if losses_H is None else -losses_H)]
        case "vote":
            starts = min(num_tries, MAX_STARTS)
            return align_and_vote(heads, num_clusters, scores_H=pairs().anmi(), seed=seeds[0], num_starts=starts)
        case "mcla":
            return mcla(heads, pairs(), num_clusters, imbalance=imbalance, seeds=seeds[:num_tries])
        case "hbgf":
            return hbgf(heads, num_clusters, imbalance=imbalance, seeds=seeds[:num_tries])
        case "cspa":
            return cspa(heads, num_clusters, imbalance=imbalance, seeds=seeds[:1])


def _fill_and_score(labels_N: Labels, heads: Heads, num_clusters: int) -> _Try:
    filled_N, num_empty = fill_empty_clusters(labels_N, heads, num_clusters)
    return _Try(anmi(filled_N, heads, num_clusters), filled_N, num_empty)


def _best_refined(tries: list[_Try], heads: Heads, num_clusters: int) -> _Try:
    if len(tries) > 1:
        tries = [_refined(one, heads, num_clusters, max_passes=SCREENING_PASSES) for one in tries]
    return _refined(_best(tries), heads, num_clusters)


def _best(tries: list[_Try]) -> _Try:
    return max(tries, key=lambda one: one.anmi)


def _refined(start: _Try, heads: Heads, num_clusters: int, **limits: int) -> _Try:
    labels_N, value = refine(start.labels_N, heads, num_clusters, **limits)
    return _Try(value, labels_N, start.num_empty)


def derive_seeds(root: int) -> list[int]:
    """MAX_SEEDS seeds of 31 bits, as METIS needs them."""
    return [int(state >> 1) for state in np.random.SeedSequence(root).generate_state(MAX_SEEDS)]
