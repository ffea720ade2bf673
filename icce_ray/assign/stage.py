"""The ``assign`` stage: a cluster for every image."""

from icce_ray.config import Config
from icce_ray.stage import Settings, Stage, num_clusters_and_seed


def _settings(config: Config) -> Settings:
    return num_clusters_and_seed(config) | {"assign": config.assign.model_dump()}


ASSIGN = Stage(
    "assign",
    "icce_ray.assign.job",
    4,
    ("images", "embed", "sample", "consensus", "corrections", "classifier"),
    _settings,
)
