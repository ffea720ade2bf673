"""`cluster_ensemble`: one clustering from many, the public face of the consensus functions (METHOD section 3).

>>> from icce_ray import cluster_ensemble
>>> result = cluster_ensemble([[0, 0, 1, 1], [1, 1, 0, 0]], n_clusters=2, random_state=0)
>>> result.labels
array([0, 0, 1, 1], dtype=int32)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.config import CONSENSUS_METHODS, ConsensusConfig
from icce_ray.consensus.agreement import measure_agreement
from icce_ray.consensus.contingency import HeadLabels, Labels, encode_heads
from icce_ray.consensus.cspa import cspa
from icce_ray.consensus.hbgf import hbgf
from icce_ray.consensus.mcla import mcla
from icce_ray.consensus.objective import anmi
from icce_ray.consensus.partition import PartitionError
from icce_ray.consensus.plain import align_and_vote, best_head, fill_empty_clusters
from icce_ray.consensus.refine import refine as refine_labels
from icce_ray.errors import InputError

MAX_SEEDS, MAX_STARTS = 4, 16
"""METIS partitions per method, and heads that `vote` starts from: the try with the highest ANMI counts."""
TRIES_BUDGET = 2_000_000
"""Labels (heads x images) times tries, about: large inputs get fewer tries, at least one."""
SCREENING_PASSES = 5
"""Refinement passes for each try; only the best try of each method is refined to the end."""
FALLBACK = "vote"
"""What is used when every method asked for failed: it needs no partitioner."""

RandomState = int | np.integer[Any] | np.random.Generator | np.random.RandomState | None


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
    skipped: dict[str, str] = field(default_factory=dict)
    """Functions that gave no result, and why."""

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
            "mean_agreement": float(self.agreement.mean(dtype=np.float64)),
            "num_clusters": len(sizes),
            "smallest_cluster": int(sizes.min()),
            "median_cluster": float(np.median(sizes)),
            "largest_cluster": int(sizes.max()),
        }


def cluster_ensemble(
    labels: npt.ArrayLike,
    n_clusters: int | None = None,
    *,
    methods: Sequence[str] | None = None,
    random_state: RandomState = None,
    refine: bool = True,
    imbalance: float = 1.5,
    cspa_max_images: int = 5000,
    head_losses: npt.ArrayLike | None = None,
) -> EnsembleResult:
    """Make one clustering of several: the consensus with the highest average NMI with them (Strehl & Ghosh 2002).

    Args:
        labels: (H, N) integers: H clusterings ("heads") of the same N images, labels from 0, -1 where one gave none.
        n_clusters: clusters of the consensus (K). Not given: as many as the head with the most.
        methods: consensus functions to try: `mcla`, `hbgf`, `cspa`, `vote` (heads aligned one to one, majority),
            `best_head` (the head with the lowest loss, else with the highest ANMI). Not given: the first four.
        random_state: seed; the same seed gives the same result.
        refine: reassign images as long as that raises the ANMI.
        imbalance: how much heavier than the average METIS may make a part.
        cspa_max_images: CSPA, which builds an N x N matrix, is left out above this many images.
        head_losses: (H,) losses of the heads, for `best_head`.

    Returns:
        The labels, 0..K-1, and what is known about them. Each of the K clusters has an image, unless fewer than K
        images differ in their labels, or the result is a head that uses fewer.

    Raises:
        InputError: (a ValueError) `labels` is not a matrix of integers, has a label below -1 or a head or image without
            any label; a parameter is out of its range; no method can be used on input of this size.
    """
    heads = encode_heads(labels)
    num_clusters = _check_num_clusters(n_clusters, heads)
    chosen = _check_methods(methods)
    losses = _check_losses(head_losses, heads)
    if not imbalance >= 1.0:
        raise InputError(f"imbalance is {imbalance}; it must be at least 1 (1.5: parts up to 1.5 times the average)")
    seeds = _derive_seeds(random_state)

    candidates: dict[str, _Candidate] = {}
    skipped: dict[str, str] = {}
    for method in chosen:
        try:
            tries = _run_method(method, heads, num_clusters, seeds, imbalance, cspa_max_images, losses)
        except (PartitionError, MemoryError) as error:
            skipped[method] = str(error) or "out of memory"
            continue
        candidates[method] = _best_of(tries, heads, num_clusters, refine)
    if not candidates:
        tries = align_and_vote(heads, num_clusters, seed=seeds[0])
        candidates[FALLBACK] = _best_of(tries, heads, num_clusters, refine)
    best = max(candidates, key=lambda method: candidates[method].anmi)
    labels_N = candidates[best].labels
    agreement = measure_agreement(labels_N, heads, num_clusters, seed=seeds[0])
    return EnsembleResult(
        labels=labels_N,
        method=best,
        anmi={method: candidate.anmi for method, candidate in candidates.items()},
        start_anmi={method: candidate.start_anmi for method, candidate in candidates.items()},
        consensus_anmi=candidates[best].anmi,
        agreement=agreement.agreement,
        vote_entropy=agreement.vote_entropy,
        second_choice=agreement.second_choice,
        skipped=skipped,
    )


@dataclass(frozen=True)
class _Candidate:
    """One method's best labels, their ANMI, and the highest ANMI of its tries before refinement."""

    labels: Labels
    anmi: float
    start_anmi: float


def _best_of(tries: list[Labels], heads: HeadLabels, num_clusters: int, refine: bool) -> _Candidate:
    scored = [(anmi(labels_N, heads, num_clusters), labels_N) for labels_N in tries]
    start_anmi = max(score for score, _ in scored)
    if refine and len(scored) > 1:
        screened = [refine_labels(try_N, heads, num_clusters, max_passes=SCREENING_PASSES) for _, try_N in scored]
        scored = [(score, labels_N) for labels_N, score in screened]
    score, labels_N = max(scored, key=lambda pair: pair[0])
    if refine:
        labels_N, score = refine_labels(labels_N, heads, num_clusters)
    return _Candidate(labels_N, score, start_anmi)


def _run_method(
    method: str,
    heads: HeadLabels,
    num_clusters: int,
    seeds: list[int],
    imbalance: float,
    cspa_max_images: int,
    losses: npt.NDArray[np.float64] | None,
) -> list[Labels]:
    if method == "best_head":
        return [best_head(heads, num_clusters, losses)]
    num_tries = max(1, TRIES_BUDGET // heads.codes.size)
    if method == "vote":
        return align_and_vote(heads, num_clusters, seed=seeds[0], num_starts=min(num_tries, MAX_STARTS))
    if method == "mcla":
        tries = mcla(heads, num_clusters, imbalance=imbalance, seeds=seeds[:num_tries])
    elif method == "hbgf":
        tries = hbgf(heads, num_clusters, imbalance=imbalance, seeds=seeds[:num_tries])
    else:
        if heads.num_images > cspa_max_images:
            raise PartitionError(f"{heads.num_images:,} images are more than cspa_max_images, {cspa_max_images:,}")
        tries = cspa(heads, num_clusters, imbalance=imbalance, seeds=seeds[:1])
    return [fill_empty_clusters(labels_N, heads, num_clusters) for labels_N in tries]


def _check_num_clusters(n_clusters: int | None, heads: HeadLabels) -> int:
    if n_clusters is None:
        found = int(heads.num_clusters.max())
        if found < 2:
            raise InputError(
                "every head has a single cluster: there is nothing to combine; give n_clusters, or other heads"
            )
        return found
    try:
        num_clusters = operator.index(n_clusters)
    except TypeError:
        raise InputError(f"n_clusters is {n_clusters!r}; it must be an integer of at least 2") from None
    if not 2 <= num_clusters <= heads.num_images:
        raise InputError(
            f"n_clusters is {num_clusters}; it must lie between 2 and the number of images, {heads.num_images}"
        )
    return num_clusters


def _check_methods(methods: Sequence[str] | None) -> tuple[str, ...]:
    if methods is None:
        return ConsensusConfig().methods
    names = (methods,) if isinstance(methods, str) else tuple(methods)
    known: tuple[str, ...] = CONSENSUS_METHODS
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        given = f"{unknown[0]!r} is none of them" if unknown else "methods is empty"
        raise InputError(f"{given}; the consensus functions are {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def _check_losses(head_losses: npt.ArrayLike | None, heads: HeadLabels) -> npt.NDArray[np.float64] | None:
    if head_losses is None:
        return None
    losses = np.asarray(head_losses, dtype=np.float64)
    if losses.shape != (heads.num_heads,):
        raise InputError(
            f"head_losses has shape {losses.shape}; it must hold one loss for each of {heads.num_heads} heads"
        )
    return losses


def _derive_seeds(random_state: RandomState) -> list[int]:
    """MAX_SEEDS seeds of 31 bits, which METIS takes."""
    if isinstance(random_state, np.random.Generator):
        root = int(random_state.integers(2**31))
    elif isinstance(random_state, np.random.RandomState):
        root = int(random_state.randint(2**31 - 1))
    elif random_state is None:
        root = int(np.random.SeedSequence().generate_state(1)[0])
    else:
        try:
            root = operator.index(random_state)
        except TypeError:
            raise InputError(
                f"random_state is {random_state!r}; give an integer, a Generator, a RandomState or None"
            ) from None
        if root < 0:
            raise InputError(f"random_state is {root}; it must not be negative")
    return [int(state >> 1) for state in np.random.SeedSequence(root).generate_state(MAX_SEEDS)]
