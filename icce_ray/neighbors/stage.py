"""The ``neighbors`` stage: the graph of neighbours, and the audit of the features that chose its thresholds."""

from icce_ray.config import Config
from icce_ray.stage import Settings, Stage, num_clusters_and_seed


def _settings(config: Config) -> Settings:
    return num_clusters_and_seed(config) | {"neighbors": config.neighbors.model_dump()}


NEIGHBORS = Stage("neighbors", "icce_ray.neighbors.job", 7, ("embed", "sample"), _settings)
