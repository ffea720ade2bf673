"""The ``cluster_count`` stage of a run with ``num_clusters: auto``, and the settings of its small clusterings: those of
the run, except where `cluster_count` has its own."""

from __future__ import annotations

from typing import Any

from icce_ray.config import ClusterCountConfig, ClusteringConfig, HeadsConfig, NeighborsConfig
from icce_ray.stage import Stage

MAX_HIDDEN_DIM, MAX_BOTTLENECK_DIM, MIN_LEARNING_RATE = 128, 64, 2e-3
"""Limits of the heads. In experiments, wider heads gave the same answer and took four times as long. Heads that are
trained too little merge clusters (of 60 planted clusters they found 50); at this rate they need half as many epochs."""


def small_heads(heads: HeadsConfig, asked: ClusterCountConfig) -> HeadsConfig:
    """The `heads` section of the small clusterings. Every head sees all dimensions, so that their agreement does not
    depend on what each was shown. Their clusters are balanced, unless the config sets a balance: heads that may leave
    clusters empty agree as well with too many of them."""
    return heads.model_copy(
        update={
            "num_heads": asked.num_heads,
            "num_epochs": asked.num_epochs,
            "hidden_dim": min(heads.hidden_dim, MAX_HIDDEN_DIM),
            "learning_rate": max(heads.learning_rate, MIN_LEARNING_RATE),
            "bottleneck_dim": min(heads.bottleneck_dim, MAX_BOTTLENECK_DIM),
            "input_share": 1.0,
            "balance": 1.0 if heads.balance == "auto" else heads.balance,
            "early_stop_change": None,
        }
    )


def fixed_neighbors(neighbors: NeighborsConfig) -> NeighborsConfig:
    """The `neighbors` section of their one graph, without a threshold: one chosen for some number of clusters would
    favour that number."""
    return neighbors.model_copy(update={"similarity_threshold": None})


def settings_of(config: ClusteringConfig) -> dict[str, Any]:
    """Everything that the clusterings depend on besides the features, JSON-able."""
    heads = small_heads(config.heads, config.cluster_count)
    return {
        "cluster_count": config.cluster_count.model_dump(),
        "heads": heads.model_dump(exclude={"checkpoint_interval_s"}),
        # Without a threshold, the other settings have no effect.
        "neighbors": config.neighbors.model_dump(include={"center", "min_neighbors"}),
        "seed": config.seed,
    }


CLUSTER_COUNT = Stage(
    "cluster_count",
    "icce_ray.count.job",
    2,
    ("embed", "sample"),
    settings_of,
    "clusterings",
    chooses_number=True,
)
