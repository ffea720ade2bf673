"""The ``cluster_count`` stage of a run with ``num_clusters: auto``."""

from __future__ import annotations

from icce_ray.count.settings import settings_of
from icce_ray.stage import Stage

CLUSTER_COUNT = Stage(
    "cluster_count",
    "icce_ray.count.job",
    2,
    ("embed", "sample"),
    settings_of,
    "clusterings",
    chooses_number=True,
)
