"""The ``cluster_count`` stage of a run with ``num_clusters: auto``."""

from __future__ import annotations

from icce_ray.config import Config
from icce_ray.stage import Settings, Stage


def _settings(config: Config) -> Settings:
    from icce_ray.count.settings import settings_of

    return settings_of(config)


CLUSTER_COUNT = Stage(
    "cluster_count",
    "icce_ray.count.job",
    2,
    ("embed", "sample"),
    _settings,
    "clusterings",
    chooses_number=True,
)
