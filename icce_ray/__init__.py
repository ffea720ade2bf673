"""Clusters image collections without labels: adaptive neighbours, many heads, one consensus (ICCE, arXiv 2511.16213).

Names are imported when they are first used: importing the package starts nothing and imports neither Ray nor torch.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if sys.platform == "win32":
    raise ImportError("icce_ray runs on Linux and macOS; on Windows, use the Windows Subsystem for Linux")

if TYPE_CHECKING:
    from icce_ray.assign.load_model import load
    from icce_ray.assign.new_images import assign_images
    from icce_ray.config import Config
    from icce_ray.consensus.ensemble import cluster_ensemble
    from icce_ray.estimator import ICCE
    from icce_ray.export.cut import cut_hierarchy
    from icce_ray.export.export_run import export_run
    from icce_ray.kmeans_estimator import KMeans
    from icce_ray.metrics.true_label_scores import clustering_accuracy
    from icce_ray.pipeline.run import run_pipeline
    from icce_ray.turtle_estimator import TURTLE

__all__ = [
    "ICCE", "TURTLE", "Config", "KMeans", "assign_images", "cluster_ensemble", "clustering_accuracy", "cut_hierarchy",
    "export_run", "load", "run_pipeline",
]  # fmt: skip

_MODULES = {
    "Config": "icce_ray.config",
    "ICCE": "icce_ray.estimator",
    "KMeans": "icce_ray.kmeans_estimator",
    "TURTLE": "icce_ray.turtle_estimator",
    "assign_images": "icce_ray.assign.new_images",
    "cluster_ensemble": "icce_ray.consensus.ensemble",
    "clustering_accuracy": "icce_ray.metrics.true_label_scores",
    "cut_hierarchy": "icce_ray.export.cut",
    "export_run": "icce_ray.export.export_run",
    "load": "icce_ray.assign.load_model",
    "run_pipeline": "icce_ray.pipeline.run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
