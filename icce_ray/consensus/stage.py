"""The ``consensus`` stage: one clustering of all rows of the label matrix."""

from __future__ import annotations

from icce_ray.config import Config
from icce_ray.stage import Settings, Stage, num_clusters_and_seed


def _settings(config: Config) -> Settings:
    return num_clusters_and_seed(config) | {"consensus": config.consensus.model_dump()}


def _check(config: Config) -> None:
    if config.consensus.extra_runs:
        from icce_ray.consensus.extra_runs import find_heads

        find_heads(config.consensus.extra_runs, config.output)


CONSENSUS = Stage("consensus", "icce_ray.consensus.job", 6, ("method", "neighbors"), _settings, "steps", check=_check)
