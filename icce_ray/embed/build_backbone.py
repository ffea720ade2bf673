"""Build the backbones of a config with their weights."""

from typing import Any

from icce_ray.config import PIXELS, BackboneConfig, EmbedConfig
from icce_ray.embed.backbone_plan import RANDOM_WEIGHTS, EmbeddingPlan, image_size, naming_backbone, plan_embedding
from icce_ray.embed.networks import Backbone, PixelsBackbone, SeveralBackbones, TimmBackbone, find_batch_size
from icce_ray.embed.weights import load_model, no_hub
from icce_ray.errors import ConfigError, one_line


def build_backbone(
    embed: EmbedConfig,
    seed: int,
    *,
    device: str = "cpu",
    num_threads: int | None = None,
    plan: EmbeddingPlan | None = None,
) -> Backbone:
    """Build the backbone with its weights; several of them as one, feature set after feature set. `seed` determines
    ``weights: random``; `plan` is that of `embed`, if it was made already.

    Usage: ``features_ND = build_backbone(config.embed, config.seed).embed(images_NHWC)``. Raises ConfigError: as
    :func:`~icce_ray.embed.backbone_plan.check_backbones`, or weights that do not fit the model (says which keys);
    ResourceError: no weights file is named and the hub cannot be reached.
    """
    plan = plan or plan_embedding(embed)
    built: list[Backbone] = []
    for index, backbone in enumerate(embed.backbones):
        with naming_backbone(index):
            features = plan.backbones[index].features
            built.append(_build_one(backbone, features, embed.precision, seed, device, num_threads))
    views = [planned.preprocessing for planned in plan.backbones]
    whole = built[0] if len(built) == 1 else SeveralBackbones(built, views)
    if embed.batch_size != "auto":
        whole.batch_size = embed.batch_size
    elif device != "cpu":
        whole.batch_size = find_batch_size(whole.embed, plan.preprocessing.shape)
    if embed.compile:  # only now: otherwise each batch size that was tried would have been compiled
        for one in built:
            if isinstance(one, TimmBackbone):
                one.compile()
    return whole


def _build_one(
    backbone: BackboneConfig, features: str, precision: Any, seed: int, device: str, num_threads: int | None
) -> Backbone:
    if backbone.backbone == PIXELS:
        return PixelsBackbone()
    import torch

    from icce_ray.embed.timm_models import create_model

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    name, size = backbone.backbone, image_size(backbone)
    if backbone.weights == RANDOM_WEIGHTS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = create_model(name, size)
    elif backbone.weights is None:
        try:
            model = create_model(name, size, pretrained=True)
        except ConfigError:
            raise
        except Exception as error:  # whatever the hub's client, and the network below it, raise
            raise no_hub(name, one_line(error)) from None
    else:
        model = load_model(name, size, backbone.weights)
    return TimmBackbone(model, features, device, precision)
