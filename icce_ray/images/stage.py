"""The ``images`` stage: the list of all images, each with an id."""

from __future__ import annotations

from icce_ray.config import Config
from icce_ray.stage import Settings, Stage
from icce_ray.store import Artifact


def _settings(config: Config) -> Settings:
    from icce_ray.images.list_images import source_digest

    return settings_for(config, source_digest(config.images, config.embeddings, config.output))


def settings_for(config: Config, source_digest: str) -> Settings:
    """The settings that determine the listing with this digest."""
    return {"images": config.images.model_dump(), "embeddings": config.embeddings.model_dump(), "source": source_digest}


IMAGES = Stage("images", "icce_ray.images.list_images", 4, (), _settings)


def num_listed(images: Artifact) -> int:
    """Number of images that the input names."""
    return int(images.num_rows("images").sum())
