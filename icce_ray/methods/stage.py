"""The ``method`` stage: clusterings of the images by the method that the config names."""

from __future__ import annotations

from icce_ray.config import Config
from icce_ray.methods import METHODS
from icce_ray.stage import Settings, Stage, num_clusters_and_seed


def method_stage(name: str) -> Stage:
    """The stage that runs the method `name`. Methods that share a section and its settings share their artifacts."""
    method = METHODS[name]

    def settings(config: Config) -> Settings:
        own = getattr(config, method.section).model_dump(exclude=set(method.free_settings))
        return num_clusters_and_seed(config) | {method.section: own}

    inputs = ("embed", "sample", "neighbors") if method.needs_graph else ("embed", "sample")
    return Stage("method", method.job, method.version, inputs, settings, method.unit)
