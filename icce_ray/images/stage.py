"""The ``images`` stage: the list of all images, each with an id."""

from dataclasses import replace

from icce_ray.config import Config
from icce_ray.stage import Settings, Stage
from icce_ray.store import Artifact


def _settings(config: Config) -> Settings:
    from icce_ray.images.list_images import source_digest

    return settings_for(config, source_digest(config))


def settings_for(config: Config, source_digest: str) -> Settings:
    """The settings that determine the listing with this digest."""
    return {"images": config.images.model_dump(), "embeddings": config.embeddings.model_dump(), "source": source_digest}


def _settings_as_listed(config: Config) -> Settings:
    from icce_ray.images.list_images import last_digest

    return settings_for(config, last_digest(config) or "not listed yet")


IMAGES = Stage("images", "icce_ray.images.list_images", 4, (), _settings)
AS_LISTED = replace(IMAGES, settings=_settings_as_listed)
"""The same with the last listing: the images are not looked at."""


def num_listed(images: Artifact) -> int:
    """Number of images that the input names."""
    return int(images.num_rows("images").sum())
