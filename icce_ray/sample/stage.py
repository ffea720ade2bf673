"""The ``sample`` stage: the images that are trained on, and the near-duplicates among them."""

from icce_ray.config import Config
from icce_ray.stage import Settings, Stage


def _settings(config: Config) -> Settings:
    return {"sample": config.sample.model_dump(), "seed": config.seed}


SAMPLE = Stage("sample", "icce_ray.sample.job", 3, ("embed",), _settings)
