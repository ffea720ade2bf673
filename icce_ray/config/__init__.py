"""Every setting of a run: what it means (schema), where its values come from (loading), and what presets fill in."""

from icce_ray.config.data_settings import (
    PIXELS,
    BackboneConfig,
    EmbedConfig,
    EmbeddingsConfig,
    EvaluateConfig,
    ImagesConfig,
    SampleConfig,
)
from icce_ray.config.loading import apply_override, build_config, load_config, put, read_yaml, validate
from icce_ray.config.machine_settings import ResourcesConfig, StorageConfig, WorkerResources, without_secrets
from icce_ray.config.method_settings import (
    CONSENSUS_METHODS,
    ClassifierConfig,
    ClusterCountConfig,
    ConsensusConfig,
    ConsensusMethod,
    ConventionalConfig,
    HeadsConfig,
    KMeansConfig,
    NeighborsConfig,
    TurtleConfig,
)
from icce_ray.config.schema import AUTO, PRESETS, ClusteringConfig, Config
from icce_ray.config.section import PositiveFloat, PositiveInt, Section, Seed

__all__ = [
    "AUTO", "CONSENSUS_METHODS", "PIXELS", "PRESETS", "BackboneConfig", "ClassifierConfig", "ClusterCountConfig",
    "ClusteringConfig", "Config", "ConsensusConfig", "ConsensusMethod", "ConventionalConfig", "EmbedConfig",
    "EmbeddingsConfig", "EvaluateConfig", "HeadsConfig", "ImagesConfig", "KMeansConfig", "NeighborsConfig",
    "PositiveFloat", "PositiveInt", "ResourcesConfig", "SampleConfig", "Section", "Seed", "StorageConfig",
    "TurtleConfig", "WorkerResources", "apply_override", "build_config", "load_config", "put", "read_yaml", "validate",
    "without_secrets",
]  # fmt: skip
