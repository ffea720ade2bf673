"""The ``assign`` stage: a cluster for every image."""

from icce_ray.stage import Stage, num_clusters_and_seed

ASSIGN = Stage(
    "assign",
    "icce_ray.assign.job",
    4,
    ("images", "embed", "sample", "consensus", "corrections", "classifier"),
    lambda config: num_clusters_and_seed(config) | {"assign": config.assign.model_dump()},
)
