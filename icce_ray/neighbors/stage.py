"""The ``neighbors`` stage: the graph of neighbours, and the audit of the features that chose its thresholds."""

from icce_ray.stage import Stage, num_clusters_and_seed

NEIGHBORS = Stage(
    "neighbors",
    "icce_ray.neighbors.job",
    7,
    ("embed", "sample"),
    lambda config: num_clusters_and_seed(config) | {"neighbors": config.neighbors.model_dump()},
)
