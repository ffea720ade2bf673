"""The ``report`` stage: a page that shows the clusters."""

from icce_ray.config import Config
from icce_ray.runtime.machine import check_umap
from icce_ray.stage import Stage

INPUTS = (
    "images", "embed", "sample", "neighbors", "method", "consensus", "corrections", "classifier", "assign", "evaluate",
    "cluster_count",
)  # fmt: skip


def _check(config: Config) -> None:
    if config.report.map == "umap":
        check_umap("report.map: umap")


REPORT = Stage(
    "report",
    "icce_ray.report.page",
    8,
    INPUTS,
    lambda config: {"report": config.report.model_dump(), "num_clusters": config.num_clusters},
    "pictures",
    check=_check,
)
