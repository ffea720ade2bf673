"""The ``report`` stage: a page that shows the clusters."""

from __future__ import annotations

from icce_ray.config import Config
from icce_ray.stage import Settings, Stage


def _settings(config: Config) -> Settings:
    return {"report": config.report.model_dump(), "num_clusters": config.num_clusters}


REPORT = Stage(
    "report",
    "icce_ray.report.page",
    5,
    (
        "images",
        "embed",
        "sample",
        "neighbors",
        "method",
        "consensus",
        "corrections",
        "classifier",
        "assign",
        "evaluate",
        "cluster_count",
    ),
    _settings,
    "clusters",
)
