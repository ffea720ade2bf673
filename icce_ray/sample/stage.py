"""The ``sample`` stage: which images take part in training."""

from __future__ import annotations

from icce_ray.config import Config
from icce_ray.stage import Settings, Stage


def _settings(config: Config) -> Settings:
    return {"max_images": config.heads.max_images, "seed": config.seed}


SAMPLE = Stage("sample", "icce_ray.sample.job", 1, ("embed",), _settings)
