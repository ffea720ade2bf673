"""Every consensus function that was asked for, each refined, and the one that the heads agree with most (ANMI) kept.

It asks for the labels in pieces only: the same code makes the consensus of an array and of a matrix on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.config import ConsensusConfig
from icce_ray.consensus.agreement import measure_agreement
from icce_ray.consensus.aligned_vote import align_and_vote, best_head, fill_empty_clusters
from icce_ray.consensus.cluster_counts import anmi, count_consensus
from icce_ray.consensus.cspa import cspa
from icce_ray.consensus.hbgf import hbgf
from icce_ray.consensus.head_overlaps import HeadPairs, compare_heads
from icce_ray.consensus.hierarchy import Hierarchy, build_hierarchy
from icce_ray.consensus.label_matrix import Heads, Labels
from icce_ray.consensus.mcla import mcla
from icce_ray.consensus.partition import PartitionError
from icce_ray.consensus.refine import refine

MAX_SEEDS, MAX_STARTS = 4, 16
"""Partitions per method, and heads that `vote` starts from: the try with the highest ANMI counts."""
TRIES_BUDGET = 2_000_000
"""Labels (heads x images) times tries, about: large inputs get fewer tries, at least one."""
SCREENING_PASSES = 5
"""Refinement passes for each try; only the best try of each method is refined to the end."""
FALLBACK = "vote"
"""What is used when every method asked for failed: it needs no partitioner."""

Say = Callable[[int, int, str], None]


@dataclass(frozen=True)
class EnsembleResult:
    """One clustering of N images made of H heads.

    ANMI is the average over the heads of the NMI (geometric mean) with the labels, 0 to 1.
    """

    labels: Labels
    """(N,) int32, 0..K-1."""
    method: str
    """The consensus function whose labels have the highest ANMI: these."""
    anmi: dict[str, float]
    """ANMI of each function tried, as compared: after refinement where that is on."""
    start_anmi: dict[str, float]
    """ANMI of each function tried, before refinement."""
    consensus_anmi: float
    """ANMI of `labels`."""
    agreement: npt.NDArray[np.float32]
    """(N,), 0 to 1: share of the heads whose aligned label is the consensus."""
    vote_entropy: npt.NDArray[np.float32]
    """(N,), nats: entropy of the heads' aligned labels."""
    second_choice: Labels
    """(N,) int32: the cluster with most votes besides the consensus; -1 where no head votes for another."""
    hierarchy: Hierarchy
    """The clusters merged step by step, those that the heads confuse most first; `hierarchy.cut(n)` leaves n groups."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Functions that gave no result, and why."""
    repaired: dict[str, int] = field(default_factory=dict)
    """Functions whose best try left clusters empty, and how many; they were given images where that was possible."""

    def summary(self) -> dict[str, Any]:
        """JSON-able figures: what was chosen, how well it agrees with the heads, how large the clusters are."""
        sizes = np.bincount(self.labels)
        sizes = sizes[sizes > 0]
        return {
            "method": self.method,
            "anmi": self.consensus_anmi,
            "anmi_by_method": self.anmi,
            "start_anmi_by_method": self.start_anmi,
            "skipped": self.skipped,
            "repaired": self.repaired,
            "mean_agreement": float(self.agreement.mean(dtype=np.float64)),
            "num_clusters": len(sizes),
            "smallest_cluster": int(sizes.min()),
            "median_cluster": float(np.median(sizes)),
            "largest_cluster": int(sizes.max()),
        }


@dataclass(frozen=True)
class _Try:
    """Labels, their ANMI, and how many clusters the function had left empty."""

    labels: Labels
    anmi: float
    num_repaired: int = 0


def find_consensus(
    heads: Heads,
    num_clusters: int,
    config: ConsensusConfig,
    *,
    seed: int,
    head_losses: npt.NDArray[np.float64] | None = None,
    say: Say = lambda done, total, note: None,
) -> EnsembleResult:
    """Make the consensus of `heads`, 0..num_clusters-1.

    Args:
        head_losses: (H,) of the heads, for `best_head`.
        say: told how many of the steps are done, and what comes next.
    """
    seeds = derive_seeds(seed)
    total = len(config.methods) + 1

    @cache
    def pairs() -> HeadPairs:
        return compare_heads(heads)

    candidates: dict[str, _Try] = {}
    start_anmi: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for done, method in enumerate((*config.methods, FALLBACK)):
        if done == len(config.methods) and candidates:
            break
        say(done, total, method)
        try:
            labels = _run_method(method, heads, pairs, num_clusters, seeds, config, head_losses)
        except (PartitionError, MemoryError) as error:
            if done == len(config.methods):
                raise
            skipped[method] = str(error) or "out of memory"
            continue
        tries = [_score(labels_N, heads, num_clusters) for labels_N in labels]
        start_anmi[method] = max(one.anmi for one in tries)
        candidates[method] = _best_of(tries, heads, num_clusters) if config.refine else max(tries, key=_anmi)
    say(len(config.methods), total, "agreement")
    best = max(candidates, key=lambda method: candidates[method].anmi)
    labels_N = candidates[best].labels
    counts_KC = count_consensus(labels_N, heads, num_clusters)
    agreement = measure_agreement(labels_N, heads, num_clusters, seed=seeds[0], counts_KC=counts_KC)
    return EnsembleResult(
        labels=labels_N,
        method=best,
        anmi={method: candidate.anmi for method, candidate in candidates.items()},
        start_anmi=start_anmi,
        consensus_anmi=candidates[best].anmi,
        agreement=agreement.agreement,
        vote_entropy=agreement.vote_entropy,
        second_choice=agreement.second_choice,
        hierarchy=build_hierarchy(counts_KC, heads.offsets),
        skipped=skipped,
        repaired={name: one.num_repaired for name, one in candidates.items() if one.num_repaired},
    )


def _run_method(
    method: str,
    heads: Heads,
    pairs: Callable[[], HeadPairs],
    num_clusters: int,
    seeds: list[int],
    config: ConsensusConfig,
    losses_H: npt.NDArray[np.float64] | None,
) -> list[Labels]:
    num_tries = max(1, TRIES_BUDGET // (heads.num_heads * heads.num_images))
    if method == "best_head":
        return [best_head(heads, num_clusters, scores_H=pairs().anmi() if losses_H is None else -losses_H)]
    if method == "vote":
        starts = min(num_tries, MAX_STARTS)
        return align_and_vote(heads, num_clusters, scores_H=pairs().anmi(), seed=seeds[0], num_starts=starts)
    if method == "mcla":
        return mcla(heads, pairs(), num_clusters, imbalance=config.imbalance, seeds=seeds[:num_tries])
    if method == "hbgf":
        return hbgf(heads, num_clusters, imbalance=config.imbalance, seeds=seeds[:num_tries])
    limit = config.cspa_max_images
    return cspa(heads, num_clusters, imbalance=config.imbalance, seeds=seeds[:1], max_images=limit)


def _score(labels_N: Labels, heads: Heads, num_clusters: int) -> _Try:
    """Partitioners leave parts empty at times: those are filled first."""
    filled_N, num_empty = fill_empty_clusters(labels_N, heads, num_clusters)
    return _Try(filled_N, anmi(filled_N, heads, num_clusters), num_empty)


def _best_of(tries: list[_Try], heads: Heads, num_clusters: int) -> _Try:
    if len(tries) > 1:
        tries = [_refined(one, heads, num_clusters, max_passes=SCREENING_PASSES) for one in tries]
    return _refined(max(tries, key=_anmi), heads, num_clusters)


def _refined(start: _Try, heads: Heads, num_clusters: int, **limits: int) -> _Try:
    labels_N, value = refine(start.labels, heads, num_clusters, **limits)
    return _Try(labels_N, value, start.num_repaired)


def _anmi(one: _Try) -> float:
    return one.anmi


def derive_seeds(root: int) -> list[int]:
    """MAX_SEEDS seeds of 31 bits, which METIS takes."""
    return [int(state >> 1) for state in np.random.SeedSequence(root).generate_state(MAX_SEEDS)]
