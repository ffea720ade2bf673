"""Which backbone a config means, and how to build it: timm networks, or the pixels themselves. METHOD section 0.

Any timm model works. A vision transformer gives its class token, the mean of its patch tokens, or the class tokens of
its last four blocks, all after the final norm; any other model its pooled features. torch and timm are imported only
when a network is asked for: ``pixels`` needs neither.

D of a transformer of width W: ``cls`` W, ``cls+patch_mean`` 2 W, ``last4`` 4 W, ``last4+patch_mean`` 5 W.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from icce_ray.config import BackboneConfig, Config, EmbedConfig
from icce_ray.embed.networks import (
    Backbone,
    PixelsBackbone,
    SeveralBackbones,
    TimmBackbone,
    common_preprocessing,
    data_config,
    extract_features,
    find_batch_size,
)
from icce_ray.embed.plan_cache import remembered
from icce_ray.embed.weights import check_hub, check_weights, load_weights, no_hub, weights_digest
from icce_ray.errors import ConfigError, UserError
from icce_ray.images.decoding import Interpolation, Preprocessing, SeveralViews

if TYPE_CHECKING:
    import torch

PIXELS = "pixels"
PIXELS_IMAGE_SIZE = 32
DEFAULT_IMAGE_SIZE = 224
RANDOM_WEIGHTS = "random"


@dataclass(frozen=True)
class BackbonePlan:
    """What is known of a backbone before its weights are."""

    preprocessing: Preprocessing
    features: str
    """The feature set that ``auto`` stands for: ``pixels``, ``pooled``, ``cls+patch_mean``, ..."""
    dim: int
    name: str
    """Of the feature set, e.g. ``vit_small_patch14_dinov2.lvd142m:cls``."""


@dataclass(frozen=True)
class EmbeddingPlan:
    """The same of all backbones of a run."""

    backbones: tuple[BackbonePlan, ...]
    """One per feature set, the one that later stages use first."""

    @property
    def preprocessing(self) -> Preprocessing | SeveralViews:
        """What serves them all."""
        return common_preprocessing([plan.preprocessing for plan in self.backbones])

    @property
    def names(self) -> list[str]:
        return [plan.name for plan in self.backbones]

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(plan.dim for plan in self.backbones)


def check_backbone(config: Config) -> None:
    """Refuse a backbone that cannot work, before any work starts; downloads no weights.

    Usage: ``check_backbone(config)`` on the driver.

    Raises:
        ConfigError: an unknown model (with close matches), features it cannot give, an image size it cannot take, a
            weights file that is not there or of another kind.
        ResourceError: no weights file is named, and the hub's name cannot be resolved here.
    """
    if config.embeddings.uri is not None:
        return
    plan_embedding(config.embed)
    for index, embed in enumerate(config.embed.backbones):
        if embed.backbone != PIXELS and embed.weights is None:
            with _named(index):
                check_hub(embed.backbone)


def plan_embedding(embed: EmbedConfig) -> EmbeddingPlan:
    """:func:`plan_backbone` of each of `embed`'s backbones.

    Usage: ``preprocessing = plan_embedding(config.embed).preprocessing``
    """
    plans = []
    for index, backbone in enumerate(embed.backbones):
        with _named(index):
            plans.append(plan_backbone(backbone))
    return EmbeddingPlan(tuple(plans))


def plan_backbone(embed: BackboneConfig) -> BackbonePlan:
    """Features, dimension and preprocessing of a backbone, found without weights (on torch's meta device), and
    remembered.

    Usage: ``dim = plan_backbone(config.embed).dim``

    Raises:
        ConfigError: as :func:`check_backbone`.
    """
    if embed.backbone == PIXELS:
        return _plan_pixels(embed)
    if embed.grayscale:
        raise ConfigError(f"embed.grayscale: only for backbone {PIXELS!r}; {embed.backbone} takes three channels")
    if embed.weights not in (None, RANDOM_WEIGHTS):
        check_weights(embed.weights)
    size = image_size(embed)
    if ":" in embed.backbone:  # on a hub or a disk, where it may change
        return _plan_network(embed, size)
    asked = {"backbone": embed.backbone, "image_size": size, "features": embed.features}
    return remembered(BackbonePlan, asked, lambda: _plan_network(embed, size))


def _plan_network(embed: BackboneConfig, size: int) -> BackbonePlan:
    import torch

    try:
        with torch.device("meta"):
            model = _create(embed.backbone, size)
        features, dim = _probe(model, embed, torch.zeros(1, 3, size, size, device="meta"))
    except (NotImplementedError, RuntimeError):  # a model that looks at values while it is built, which meta has not
        model = _create(embed.backbone, size)
        features, dim = _probe(model, embed, torch.zeros(1, 3, size, size))
    return BackbonePlan(_preprocessing(model, size), features, dim, f"{embed.backbone}:{features}")


def make_backbone(
    config: Config, *, device: str = "cpu", num_threads: int | None = None, plan: EmbeddingPlan | None = None
) -> Backbone:
    """Build the backbone with its weights; several of them as one, feature set after feature set.

    Usage: ``features_ND = make_backbone(config).embed(images_NHWC)``

    Args:
        config: its `embed` section says which; `seed` decides ``weights: random``.
        device: torch device.
        num_threads: CPU threads of this process; None leaves torch's choice.
        plan: of `config`, where it was made already.

    Raises:
        ConfigError: as :func:`check_backbone`, and weights that do not fit the model (which keys).
        ResourceError: no weights file is named and the hub cannot be reached.
    """
    plan = plan or plan_embedding(config.embed)
    made: list[Backbone] = []
    for index, embed in enumerate(config.embed.backbones):
        with _named(index):
            made.append(_make_one(embed, plan.backbones[index], config, device, num_threads))
    views = [planned.preprocessing for planned in plan.backbones]
    backbone = made[0] if len(made) == 1 else SeveralBackbones(made, views)
    if config.embed.batch_size != "auto":
        backbone.batch_size = config.embed.batch_size
    elif device != "cpu":
        backbone.batch_size = find_batch_size(backbone.embed, plan.preprocessing.shape)
    if config.embed.compile:  # only now: each size that was tried would have been compiled
        for one in made:
            if isinstance(one, TimmBackbone):
                one.compile()
    return backbone


def _make_one(
    embed: BackboneConfig, plan: BackbonePlan, config: Config, device: str, num_threads: int | None
) -> Backbone:
    if embed.backbone == PIXELS:
        return PixelsBackbone(plan.dim)
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    name, size = embed.backbone, image_size(embed)
    weights = embed.weights
    if weights == RANDOM_WEIGHTS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = _create(name, size)
    elif weights is None:
        model = _create_from_hub(name, size)
    else:
        model = load_weights(lambda **options: _create(name, size, **options), weights, name)
    return TimmBackbone(model, plan.features, plan.dim, device, config.embed.precision)


def image_size(embed: BackboneConfig) -> int:
    """Side of the square input in pixels, defaults filled in."""
    if embed.image_size is not None:
        return embed.image_size
    return PIXELS_IMAGE_SIZE if embed.backbone == PIXELS else DEFAULT_IMAGE_SIZE


def embed_settings(config: Config) -> dict[str, Any]:
    """Everything that determines the content of the ``embed`` artifact, besides the images themselves.

    Usage: ``fingerprint("embed", job.VERSION, embed_settings(config), {"images": images.fingerprint})``

    A weights file counts by its content, not its path. `batch_size` and `compile` are left out (they change features by
    rounding only), and so is `max_error_rate`: raising it after a stop goes on with the finished parts.

    Raises:
        ConfigError: the weights file is not there.
    """
    if config.embeddings.uri is not None:
        return {"embeddings": {"column": config.embeddings.column}}
    embed = config.embed
    settings = {"max_image_pixels": embed.max_image_pixels} | _backbone_settings(embed, config)
    if embed.extra:
        settings["extra"] = [_backbone_settings(extra, config) for extra in embed.extra]
    return {"embed": settings}


def _backbone_settings(embed: BackboneConfig, config: Config) -> dict[str, Any]:
    settings: dict[str, Any] = {"backbone": embed.backbone, "image_size": image_size(embed)}
    if embed.backbone == PIXELS:
        return settings | {"grayscale": embed.grayscale}
    settings |= {"features": embed.features, "weights": "hub" if embed.weights is None else embed.weights}
    settings["precision"] = config.embed.precision
    if embed.weights == RANDOM_WEIGHTS:
        settings["seed"] = config.seed
    elif embed.weights is not None:
        settings["weights"] = "sha256:" + weights_digest(embed.weights)
    return settings


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Within it, errors say which of the backbones they mean."""
    try:
        yield
    except UserError as error:
        if index == 0:
            raise
        raise type(error)(f"embed.extra[{index - 1}]: {error}") from None


def _plan_pixels(embed: BackboneConfig) -> BackbonePlan:
    for setting, value in (("features", embed.features), ("weights", embed.weights)):
        if value not in (None, "auto"):
            raise ConfigError(f"embed.{setting}: {value!r} is for networks; leave it out with backbone {PIXELS!r}")
    size = image_size(embed)
    preprocessing = Preprocessing(size=size, scale_size=size, grayscale=embed.grayscale)
    return BackbonePlan(preprocessing, PIXELS, int(np.prod(preprocessing.shape)), PIXELS)


def _create(name: str, size: int, **options: Any) -> Any:
    """The timm model without its classification layer, for square inputs of `size` where it depends on that."""
    import timm

    architecture = name.partition(".")[0]
    if ":" not in name and not timm.is_model(architecture):
        close = difflib.get_close_matches(name, [PIXELS, *timm.list_models(), *timm.list_pretrained()], n=5)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ConfigError(f"embed.backbone: timm has no model {name!r}{hint}. Any timm model name goes, or {PIXELS!r}")
    try:
        try:
            model = timm.create_model(name, num_classes=0, img_size=size, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = timm.create_model(name, num_classes=0, **options)
    except RuntimeError as error:
        if "pretrained tag" not in str(error):
            raise
        tags = [known for known in timm.list_pretrained() if known.startswith(f"{architecture}.")]
        raise ConfigError(f"embed.backbone: {name!r}: no such weights tag; there are {', '.join(tags)}") from None
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"embed.image_size: {name} cannot be built for {size} pixels: {error}") from None
    return model.eval()


def _create_from_hub(name: str, size: int) -> Any:
    try:
        return _create(name, size, pretrained=True)
    except ConfigError:
        raise
    except Exception as error:  # whatever the hub's client, and the network below it, raise
        raise no_hub(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


def _choose_features(model: Any, embed: BackboneConfig) -> str:
    has_tokens = getattr(model, "cls_token", None) is not None and getattr(model, "num_prefix_tokens", 0) >= 1
    if embed.features == "auto":
        return "cls+patch_mean" if has_tokens else "pooled"
    if embed.features != "pooled" and not has_tokens:
        raise ConfigError(
            f"embed.features: {embed.backbone} has no class token, so no {embed.features!r}; use 'pooled'"
        )
    if embed.features.startswith("last4") and not hasattr(model, "forward_intermediates"):
        raise ConfigError(
            f"embed.features: {embed.backbone} does not give its last blocks; use 'cls' or 'cls+patch_mean'"
        )
    return embed.features


def _probe(model: Any, embed: BackboneConfig, example: torch.Tensor) -> tuple[str, int]:
    """The features that `embed` means, and their dimension, by trying."""
    import torch

    features = _choose_features(model, embed)
    try:
        with torch.inference_mode():
            return features, int(extract_features(model, example, features).shape[1])
    except AssertionError as error:
        size = example.shape[-1]
        raise ConfigError(f"embed.image_size: {embed.backbone} cannot take {size} pixels: {error}") from None
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"embed.features: {embed.backbone} cannot give {features!r}: {error}") from None


def _preprocessing(model: Any, size: int) -> Preprocessing:
    data = data_config(model)
    known: dict[str, Interpolation] = {"nearest": "nearest", "bilinear": "bilinear", "lanczos": "lanczos"}
    return Preprocessing(
        size=size,
        scale_size=max(size, int(size / data["crop_pct"])),
        interpolation=known.get(data["interpolation"], "bicubic"),
        squash=data["crop_mode"] == "squash",
    )
