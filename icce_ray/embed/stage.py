"""The ``embed`` stage: an embedding for each image, or the reason why there is none."""

from icce_ray.config import Config
from icce_ray.errors import ConfigError
from icce_ray.stage import Settings, Stage
from icce_ray.store import Artifact

SMALL_BACKBONE = "vit_small_patch14_dinov2.lvd142m"
"""On a CPU, some 14 times as fast as the default."""


def _settings(config: Config) -> Settings:
    from icce_ray.embed.backbone_plan import embed_settings

    return embed_settings(config.embed, config.embeddings, config.seed)


def _check(config: Config) -> None:
    if config.embeddings.uri is None:
        if config.embed.decoder == "nvjpeg" and not config.resources.embed.gpus_per_worker:
            raise ConfigError(
                "embed.decoder: nvjpeg decodes on GPUs; set resources.embed.gpus_per_worker=1, or the decoder to pillow"
            )
        from icce_ray.embed.backbone_plan import check_backbones

        check_backbones(config.embed)


def _shortcut(config: Config) -> str:
    hints = []
    if config.embed.backbone != SMALL_BACKBONE:
        hints.append(f"a small backbone (embed.backbone={SMALL_BACKBONE})")
    if not config.resources.embed.gpus_per_worker:
        hints.append("a GPU (resources.embed.gpus_per_worker=1)")
    return ", ".join(hints) if config.embeddings.uri is None else ""


EMBED = Stage("embed", "icce_ray.embed.embed_images", 7, ("images",), _settings, check=_check, shortcut=_shortcut)


def num_failed(embed: Artifact) -> int:
    """Number of images that could not be used."""
    return embed.part("errors.parquet").rows or 0
