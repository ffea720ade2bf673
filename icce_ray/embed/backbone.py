"""From pixels to features: a frozen network, or the pixels themselves. METHOD section 0.

Any timm model works. A vision transformer gives its class token, the mean of its patch tokens, or the class tokens of
its last four blocks, all after the final norm; any other model its pooled features. torch and timm are imported only
when a network is asked for: ``pixels`` needs neither.

D of a transformer of width W: ``cls`` W, ``cls+patch_mean`` 2 W, ``last4`` 4 W, ``last4+patch_mean`` 5 W.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from icce_ray.config import Config, EmbedConfig
from icce_ray.embed.images import Interpolation, Pixels, Preprocessing
from icce_ray.embed.weights import check_hub, check_weights, load_weights, no_hub, weights_digest
from icce_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch

PIXELS = "pixels"
PIXELS_IMAGE_SIZE = 32
DEFAULT_IMAGE_SIZE = 224
RANDOM_WEIGHTS = "random"


class Backbone(Protocol):
    """Turns images into features. Holds no state that an image could change."""

    dim: int

    def embed(self, images_BHWC: Pixels) -> npt.NDArray[np.float16]:
        """(B, H, W, C) uint8 as :class:`Preprocessing` says -> (B, dim) float16.

        Features beyond float16's range come out infinite, and not-a-number stays: the caller leaves those images out.
        """


@dataclass(frozen=True)
class BackbonePlan:
    """What is known of a backbone before its weights are."""

    preprocessing: Preprocessing
    features: str
    """The feature set that ``auto`` stands for: ``pixels``, ``pooled``, ``cls+patch_mean``, ..."""
    dim: int
    name: str
    """Of the feature set, e.g. ``vit_small_patch14_dinov2.lvd142m:cls``."""


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
    plan_backbone(config.embed)
    if config.embed.backbone != PIXELS and config.embed.weights is None:
        check_hub(config.embed.backbone)


def plan_backbone(embed: EmbedConfig) -> BackbonePlan:
    """Features, dimension and preprocessing of `embed`'s backbone, found without weights (on torch's meta device).

    Usage: ``preprocessing = plan_backbone(config.embed).preprocessing``

    Raises:
        ConfigError: as :func:`check_backbone`.
    """
    if embed.backbone == PIXELS:
        return _plan_pixels(embed)
    if embed.grayscale:
        raise ConfigError(f"embed.grayscale: only for backbone {PIXELS!r}; {embed.backbone} takes three channels")
    if embed.weights not in (None, RANDOM_WEIGHTS):
        check_weights(embed.weights)
    import torch

    size = image_size(embed)
    try:
        with torch.device("meta"):
            model = _create(embed.backbone, size)
        features, dim = _probe(model, embed, torch.zeros(1, 3, size, size, device="meta"))
    except (NotImplementedError, RuntimeError):  # a model that looks at values while it is built, which meta has not
        model = _create(embed.backbone, size)
        features, dim = _probe(model, embed, torch.zeros(1, 3, size, size))
    return BackbonePlan(_preprocessing(model, size), features, dim, f"{embed.backbone}:{features}")


def make_backbone(config: Config, *, device: str = "cpu", num_threads: int | None = None) -> Backbone:
    """Build the backbone with its weights.

    Usage: ``features_ND = make_backbone(config).embed(images_NHWC)``

    Args:
        config: its `embed` section says which; `seed` decides ``weights: random``.
        device: torch device.
        num_threads: CPU threads of this process; None leaves torch's choice.

    Raises:
        ConfigError: as :func:`check_backbone`, and weights that do not fit the model (which keys).
        ResourceError: no weights file is named and the hub cannot be reached.
    """
    plan = plan_backbone(config.embed)
    if config.embed.backbone == PIXELS:
        return PixelsBackbone(plan.dim)
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    name, size = config.embed.backbone, image_size(config.embed)
    weights = config.embed.weights
    if weights == RANDOM_WEIGHTS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = _create(name, size)
    elif weights is None:
        model = _create_from_hub(name, size)
    else:
        model = load_weights(lambda **options: _create(name, size, **options), weights, name)
    return TimmBackbone(model, plan, device)


class PixelsBackbone:
    """The flattened pixels, 0 to 1."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def embed(self, images_BHWC: Pixels) -> npt.NDArray[np.float16]:
        return (images_BHWC.reshape(len(images_BHWC), -1) / np.float32(255.0)).astype(np.float16)


class TimmBackbone:
    """A frozen timm model in inference mode, float32."""

    def __init__(self, model: torch.nn.Module, plan: BackbonePlan, device: str) -> None:
        import torch

        self.dim = plan.dim
        self._features = plan.features
        self._device = torch.device(device)
        self._model = model.eval().requires_grad_(False).to(self._device)
        data = _data_config(model)
        self._mean = torch.tensor(data["mean"], device=self._device)
        self._std = torch.tensor(data["std"], device=self._device)

    def embed(self, images_BHWC: Pixels) -> npt.NDArray[np.float16]:
        import torch

        # A copy: the array may be shared memory, which torch would write through.
        pixels = torch.from_numpy(np.array(images_BHWC)).to(self._device)
        with torch.inference_mode():
            scaled = (pixels.float() / 255.0 - self._mean) / self._std
            features = extract_features(self._model, scaled.permute(0, 3, 1, 2).contiguous(), self._features)
            result: npt.NDArray[np.float16] = features.to(torch.float16).cpu().numpy()
        return result


def extract_features(model: Any, images_BCHW: torch.Tensor, features: str) -> torch.Tensor:
    """Normalised images -> (B, D) float32; `features` as in METHOD section 0, tokens after the model's final norm."""
    import torch

    if features == "pooled":
        pooled: torch.Tensor = model(images_BCHW)
        return pooled.flatten(1)
    if features.startswith("last4"):
        blocks = model.forward_intermediates(
            images_BCHW, indices=4, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        chosen = [prefix[:, 0] for _, prefix in blocks]
        patches = blocks[-1][0]
    else:
        tokens = model.forward_features(images_BCHW)
        chosen, patches = [tokens[:, 0]], tokens[:, model.num_prefix_tokens :]
    if features.endswith("patch_mean"):
        chosen.append(patches.mean(dim=1))
    return torch.cat(chosen, dim=1)


def image_size(embed: EmbedConfig) -> int:
    """Side of the square input in pixels, defaults filled in."""
    if embed.image_size is not None:
        return embed.image_size
    return PIXELS_IMAGE_SIZE if embed.backbone == PIXELS else DEFAULT_IMAGE_SIZE


def embed_settings(config: Config) -> dict[str, Any]:
    """Everything that determines the content of the ``embed`` artifact, besides the images themselves.

    Usage: ``fingerprint("embed", job.VERSION, embed_settings(config), {"images": images.fingerprint})``

    A weights file counts by its content, not its path. `batch_size` is left out (it changes features by rounding only),
    and so is `max_error_rate`: raising it after a stop goes on with the finished parts.

    Raises:
        ConfigError: the weights file is not there.
    """
    if config.embeddings.uri is not None:
        return {"embeddings": {"column": config.embeddings.column}}
    embed = config.embed
    settings = embed.model_dump(
        mode="json", exclude={"batch_size", "max_error_rate", "weights", "features", "grayscale"}
    )
    settings["image_size"] = image_size(embed)
    if embed.backbone == PIXELS:
        return {"embed": settings | {"grayscale": embed.grayscale}}
    settings |= {"features": embed.features, "weights": "hub" if embed.weights is None else embed.weights}
    if embed.weights == RANDOM_WEIGHTS:
        settings["seed"] = config.seed
    elif embed.weights is not None:
        settings["weights"] = "sha256:" + weights_digest(embed.weights)
    return {"embed": settings}


def _plan_pixels(embed: EmbedConfig) -> BackbonePlan:
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


def _choose_features(model: Any, embed: EmbedConfig) -> str:
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


def _probe(model: Any, embed: EmbedConfig, example: torch.Tensor) -> tuple[str, int]:
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
    data = _data_config(model)
    known: dict[str, Interpolation] = {"nearest": "nearest", "bilinear": "bilinear", "lanczos": "lanczos"}
    return Preprocessing(
        size=size,
        scale_size=max(size, int(size / data["crop_pct"])),
        interpolation=known.get(data["interpolation"], "bicubic"),
        squash=data["crop_mode"] == "squash",
    )


def _data_config(model: Any) -> dict[str, Any]:
    """timm's: mean, std, interpolation, crop_pct, crop_mode."""
    from timm.data.config import resolve_model_data_config

    settings: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return settings
