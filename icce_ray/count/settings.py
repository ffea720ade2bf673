"""The settings of the small clusterings: those of the run, but for what `cluster_count` has its own of."""

from __future__ import annotations

from typing import Any

from icce_ray.config import Config, HeadsConfig, NeighborsConfig

MAX_HIDDEN_DIM, MAX_BOTTLENECK_DIM, MIN_LEARNING_RATE = 128, 64, 2e-3
"""Of the heads. Where it was tried, wider ones told the same and took four times as long. Heads that are trained too
little merge what belongs apart: of 60 planted clusters they then stand best at 50. At this rate they need half as many
epochs. They see all dimensions: what they agree on should not hang on what each was shown [ours]."""


def heads_config(config: Config) -> HeadsConfig:
    """The `heads` section of the small clusterings."""
    asked, heads = config.cluster_count, config.heads
    return heads.model_copy(
        update={
            "num_heads": asked.num_heads,
            "num_epochs": asked.num_epochs,
            "hidden_dim": min(heads.hidden_dim, MAX_HIDDEN_DIM),
            "learning_rate": max(heads.learning_rate, MIN_LEARNING_RATE),
            "bottleneck_dim": min(heads.bottleneck_dim, MAX_BOTTLENECK_DIM),
            "input_share": 1.0,
            "early_stop_change": None,
        }
    )


def neighbors_config(config: Config) -> NeighborsConfig:
    """The `neighbors` section of their one graph. A threshold chosen for one number of clusters would favour it."""
    return config.neighbors.model_copy(update={"similarity_threshold": None})


def settings_of(config: Config) -> dict[str, Any]:
    """All that the clusterings depend on besides the features, JSON-able."""
    return {
        "cluster_count": config.cluster_count.model_dump(),
        "heads": heads_config(config).model_dump(exclude={"checkpoint_interval_s", "max_images"}),
        # Lists of one length, of one feature set: the other settings of the section have no say.
        "neighbors": neighbors_config(config).model_dump(include={"center", "min_neighbors", "duplicate_threshold"}),
        "seed": config.seed,
    }
