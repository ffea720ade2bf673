"""The ``images`` stage: the list of all images, each with an id."""

from __future__ import annotations

from icce_ray.config import Config
from icce_ray.stage import Settings, Stage
from icce_ray.store import Artifact


def _settings(config: Config) -> Settings:
    from icce_ray.images.listing import source_digest

    images = config.images.model_dump(exclude={"refresh"})
    given = {"images": images, "embeddings": config.embeddings.model_dump()}
    return given | {"source": source_digest(config)}


IMAGES = Stage("images", "icce_ray.images.listing", 2, (), _settings)


def num_listed(images: Artifact) -> int:
    """Number of images that the input names."""
    return sum(images.part(name).rows or 0 for name in images.part_names("images"))
