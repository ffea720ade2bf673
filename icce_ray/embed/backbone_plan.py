"""Which backbones a config means: their features, dimensions and preprocessing, found without their weights.

Any timm model works. A vision transformer gives its class token, the mean of its patch tokens, or the class tokens of
its last four blocks, all after the final norm; any other model gives its pooled features. torch and timm, which take
seconds, are imported only when a network has to be looked at: ``pixels`` needs neither, and the plan of a network is
kept on this machine.

D of a transformer of width W: ``cls`` W, ``cls+patch_mean`` 2 W, ``last4`` 4 W, ``last4+patch_mean`` 5 W.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from pydantic import TypeAdapter, ValidationError

from icce_ray.config import PIXELS, BackboneConfig, EmbedConfig, EmbeddingsConfig
from icce_ray.embed.weights import check_hub, check_weights, weights_digest
from icce_ray.errors import ConfigError, UserError
from icce_ray.images.preprocessing import Preprocessing, SeveralViews, common_preprocessing
from icce_ray.store import Folder, fingerprint
from icce_ray.store.cache import cache_folder

VERSION = 1
PIXELS_IMAGE_SIZE = 32
DEFAULT_IMAGE_SIZE = 224
RANDOM_WEIGHTS = "random"


@dataclass(frozen=True)
class BackbonePlan:
    """Description of a backbone, without its weights."""

    preprocessing: Preprocessing
    features: str
    """What `auto` stands for: ``pixels``, ``pooled``, ``cls+patch_mean``, ..."""
    dim: int
    name: str
    """Name of the feature set, e.g. ``vit_small_patch14_dinov2.lvd142m:cls``."""


@dataclass(frozen=True)
class EmbeddingPlan:
    """The plans of all backbones of a run, one for each feature set."""

    backbones: tuple[BackbonePlan, ...]

    @property
    def preprocessing(self) -> Preprocessing | SeveralViews:
        return common_preprocessing([plan.preprocessing for plan in self.backbones])

    @property
    def names(self) -> list[str]:
        return [plan.name for plan in self.backbones]

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(plan.dim for plan in self.backbones)


def check_backbones(embed: EmbedConfig) -> None:
    """Refuse backbones that cannot work, before any work starts. Downloads no weights. Raises ConfigError: an unknown
    model (with close matches), features it cannot give, an image size it cannot take, a weights file that is missing or
    of another kind; ResourceError: no weights file is named, and the hub's name cannot be resolved here."""
    plan_embedding(embed)
    for index, backbone in enumerate(embed.backbones):
        if backbone.backbone != PIXELS and backbone.weights is None:
            with naming_backbone(index):
                check_hub(backbone.backbone)


def plan_embedding(embed: EmbedConfig) -> EmbeddingPlan:
    """Plan all backbones of a config. Usage: ``preprocessing = plan_embedding(config.embed).preprocessing``"""
    plans = []
    for index, backbone in enumerate(embed.backbones):
        with naming_backbone(index):
            plans.append(plan_backbone(backbone))
    return EmbeddingPlan(tuple(plans))


def plan_backbone(backbone: BackboneConfig) -> BackbonePlan:
    """Plan one backbone. The plan of a network is remembered. Usage: ``dim = plan_backbone(config.embed).dim``. Raises
    ConfigError: as :func:`check_backbones`."""
    name, size = backbone.backbone, image_size(backbone)
    if name == PIXELS:
        return _plan_pixels(backbone, size)
    if backbone.grayscale:
        raise ConfigError(f"embed.grayscale: only for backbone {PIXELS!r}; {name} takes three channels")
    if backbone.weights not in (None, RANDOM_WEIGHTS):
        check_weights(backbone.weights)
    if ":" in name:  # on a hub or a disk, where it may change
        return _plan_network(name, size, backbone.features)
    return _remembered_plan(name, size, backbone.features)


def image_size(backbone: BackboneConfig) -> int:
    """Side of the square input in pixels, defaults filled in."""
    if backbone.image_size is not None:
        return backbone.image_size
    return PIXELS_IMAGE_SIZE if backbone.backbone == PIXELS else DEFAULT_IMAGE_SIZE


def embed_settings(embed: EmbedConfig, embeddings: EmbeddingsConfig, seed: int) -> dict[str, Any]:
    """Everything that determines the content of the ``embed`` artifact, besides the images themselves.

    A weights file counts by its content, not its path. `batch_size` and `compile` are left out (they change features by
    rounding only), and so is `max_error_rate`: when it is raised after a stop, the finished parts are used. Raises
    ConfigError: the weights file is missing."""
    if embeddings.uri is not None:
        return {"embeddings": {"column": embeddings.column}}
    settings = {"max_image_pixels": embed.max_image_pixels} | _backbone_settings(embed, embed.precision, seed)
    if embed.decoder != "pillow":
        settings["decoder"] = embed.decoder
    if embed.extra:
        settings["extra"] = [_backbone_settings(extra, embed.precision, seed) for extra in embed.extra]
    return {"embed": settings}


def model_key(settings: dict[str, Any], plan: EmbeddingPlan) -> str:
    """16 hex digits of what determines an image's embedding besides its bytes: backbone, weights, preprocessing,
    features. `settings` are from :func:`embed_settings`."""
    embed = {key: value for key, value in settings["embed"].items() if key != "max_image_pixels"}
    content = {"embed": embed, "backbones": [asdict(backbone) for backbone in plan.backbones]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def naming_backbone(index: int) -> Iterator[None]:
    """Errors raised inside say which of the backbones they mean."""
    try:
        yield
    except UserError as error:
        if index == 0:
            raise
        raise type(error)(f"embed.extra[{index - 1}]: {error}") from None


def _backbone_settings(backbone: BackboneConfig, precision: str, seed: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"backbone": backbone.backbone, "image_size": image_size(backbone)}
    if backbone.backbone == PIXELS:
        return settings | {"grayscale": backbone.grayscale}
    settings |= {"features": backbone.features, "weights": backbone.weights or "hub", "precision": precision}
    if backbone.weights == RANDOM_WEIGHTS:
        settings["seed"] = seed
    elif backbone.weights is not None:
        settings["weights"] = "sha256:" + weights_digest(backbone.weights)
    return settings


def _plan_pixels(backbone: BackboneConfig, size: int) -> BackbonePlan:
    for setting, value in (("features", backbone.features), ("weights", backbone.weights)):
        if value not in (None, "auto"):
            raise ConfigError(f"embed.{setting}: {value!r} is for networks; leave it out with backbone {PIXELS!r}")
    preprocessing = Preprocessing(size=size, scale_size=size, grayscale=backbone.grayscale)
    return BackbonePlan(preprocessing, PIXELS, math.prod(preprocessing.shape), PIXELS)


def _remembered_plan(name: str, size: int, features: str) -> BackbonePlan:
    """What :func:`_plan_network` found with this version of timm; otherwise what it finds now, after seconds."""
    asked = {"backbone": name, "image_size": size, "features": features, "timm": version("timm")}
    folder, file = Folder.at(cache_folder() / "backbones"), f"{fingerprint('backbone', VERSION, asked, {})}.json"
    plans = TypeAdapter(BackbonePlan)
    with suppress(OSError, ValidationError):
        return plans.validate_json(folder.read_bytes(file))
    found = _plan_network(name, size, features)
    with suppress(OSError):  # a full or read-only cache costs seconds the next time
        folder.write_bytes(file, plans.dump_json(found))
    return found


def _plan_network(name: str, size: int, features: str) -> BackbonePlan:
    import torch

    from icce_ray.embed.timm_models import create_model, model_preprocessing, probe_features

    try:
        with torch.device("meta"):
            model = create_model(name, size)
        features, dim = probe_features(model, name, features, torch.zeros(1, 3, size, size, device="meta"))
    except (NotImplementedError, RuntimeError):  # a model that reads values while it is built; meta tensors have none
        model = create_model(name, size)
        features, dim = probe_features(model, name, features, torch.zeros(1, 3, size, size))
    return BackbonePlan(model_preprocessing(model, size), features, dim, f"{name}:{features}")
