"""The ``embed`` stage: an embedding for each image, or the reason why there is none."""

from __future__ import annotations

from icce_ray.config import Config
from icce_ray.stage import Settings, Stage
from icce_ray.store import Artifact


def _settings(config: Config) -> Settings:
    from icce_ray.embed.backbone_plan import embed_settings

    return embed_settings(config.embed, config.embeddings, config.seed)


def _check(config: Config) -> None:
    if config.embeddings.uri is None:
        from icce_ray.embed.backbone_plan import check_backbones

        check_backbones(config.embed)


EMBED = Stage("embed", "icce_ray.embed.job", 5, ("images",), _settings, check=_check)


def num_failed(embed: Artifact) -> int:
    """Number of images that could not be used."""
    return embed.part("errors.parquet").rows or 0
