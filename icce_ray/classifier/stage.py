"""The ``classifier`` stage: a linear classifier that learns the consensus (self-training)."""

from icce_ray.config import Config
from icce_ray.stage import Settings, Stage, num_clusters_and_seed


def _settings(config: Config) -> Settings:
    own = {"classifier": config.classifier.model_dump(), "outlier_quantile": config.assign.outlier_quantile}
    return num_clusters_and_seed(config) | own


CLASSIFIER = Stage(
    "classifier", "icce_ray.classifier.job", 4, ("embed", "sample", "consensus", "corrections"), _settings, "iterations"
)
