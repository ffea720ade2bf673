"""The ``cluster_count`` stage of a run with ``num_clusters: auto``."""

from typing import Any

from icce_ray.config import ClusteringConfig
from icce_ray.stage import Stage


def settings_of(config: ClusteringConfig) -> dict[str, Any]:
    """Everything that the clusterings depend on besides the features, JSON-able."""
    return {
        "cluster_count": config.cluster_count.model_dump(),
        "center": config.neighbors.center,
        "seed": config.seed,
    }


CLUSTER_COUNT = Stage(
    "cluster_count",
    "icce_ray.count.job",
    6,
    ("embed", "sample"),
    settings_of,
    "parts of the sample",
    chooses_number=True,
)
