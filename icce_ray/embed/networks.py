"""Backbones turn pixels into features: a timm network, the pixels themselves, or several of them side by side.

Matrix products in bfloat16 or float16 use autocast: norms and sums over tokens stay float32. The products' weights are
held in the reduced precision, to which autocast would cast them in each pass: the same bits, in half the memory.
Measured on 2 cores with bfloat16 units, in images/s: a ViT-S/14 12.7 in float32 and 28.9 in bfloat16; a ResNet-50 16.1
and 36.2, with channels last 24.3 and 54.4. A ViT gains nothing from channels last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from icce_ray.config import PIXELS, BackboneConfig, EmbedConfig
from icce_ray.embed.backbone_plan import RANDOM_WEIGHTS, EmbeddingPlan, image_size, naming_backbone, plan_embedding
from icce_ray.embed.weights import load_model, no_hub
from icce_ray.errors import ConfigError, one_line
from icce_ray.images.preprocessing import Pixels, Preprocessing, SeveralViews, common_preprocessing
from icce_ray.runtime.machine import Precision, matmul_dtype

if TYPE_CHECKING:
    import torch

DEFAULT_BATCH_SIZE = 64
MIN_BATCH_SIZE = 16
MAX_BATCH_SIZE = 1024
MIN_GAIN = 1.05
"""Doubling the batch is worth its memory if it makes the backbone this many times as fast."""

Features = npt.NDArray[np.float16]


class PixelsBackbone:
    """The flattened pixels, 0 to 1."""

    batch_size = DEFAULT_BATCH_SIZE
    """Images per call that suit the device."""

    def load(self, images_BHWC: Pixels) -> Any:
        """Bring images to the device for :meth:`embed`, while other images may be on their way through the network."""
        return images_BHWC

    def embed(self, images_BHWC: Any) -> Features:
        """Preprocessed images (B, H, W, C) uint8, or what `load` returned -> (B, D) float16, one feature set after the
        other. Features beyond the range of float16 become infinite, and NaN stays: the caller leaves those images
        out."""
        pixels: Pixels = images_BHWC.reshape(len(images_BHWC), -1)
        return (pixels / np.float32(255.0)).astype(np.float16)


class TimmBackbone:
    """A frozen timm model in inference mode, without its classification layer. For `features` see
    :mod:`icce_ray.embed.backbone_plan`; `precision` is that of the matrix products."""

    batch_size = DEFAULT_BATCH_SIZE

    def __init__(self, model: torch.nn.Module, features: str, device: str, precision: Precision) -> None:
        import torch

        from icce_ray.embed.timm_models import data_config, extract_features

        self._device = torch.device(device)
        is_cuda = self._device.type == "cuda"
        self._copies = torch.cuda.Stream(self._device) if is_cuda else None  # type: ignore[no-untyped-call]
        """Copies to the device that do not wait for the network."""
        self._dtype = matmul_dtype(precision, self._device)
        self._layout = torch.channels_last if features == "pooled" else torch.contiguous_format
        for module in model.modules():
            if type(module) in (torch.nn.Linear, torch.nn.Conv2d):  # subclasses may compute with their weights
                module.to(self._dtype)
        self._model = model.eval().requires_grad_(False).to(self._device).to(memory_format=self._layout)
        data = data_config(model)
        self._mean = torch.tensor(data["mean"], device=self._device)
        self._std = torch.tensor(data["std"], device=self._device)
        self._forward: Callable[..., torch.Tensor] = partial(extract_features, self._model, features=features)

    def compile(self) -> None:
        """Use ``torch.compile`` from here on; the next call takes about a minute."""
        import torch

        self._forward = torch.compile(self._forward)

    def load(self, images_BHWC: Pixels) -> Pixels | torch.Tensor:
        import torch

        try:
            return self._to_device(images_BHWC)
        except torch.cuda.OutOfMemoryError:
            return images_BHWC  # for `embed`, which halves them

    def _to_device(self, images_BHWC: Pixels) -> torch.Tensor:
        import torch

        # A copy: the array may be shared memory, and torch would write to it.
        if self._copies is None:
            return torch.from_numpy(np.array(images_BHWC)).to(self._device)
        pinned = torch.empty(images_BHWC.shape, dtype=torch.uint8, pin_memory=True)
        pinned.numpy()[...] = images_BHWC
        with torch.cuda.stream(self._copies):
            pixels = pinned.to(self._device, non_blocking=True)
        self._copies.synchronize()
        return pixels

    def embed(self, images_BHWC: Pixels | torch.Tensor) -> Features:
        import torch

        try:
            return self._embed(images_BHWC)
        except torch.cuda.OutOfMemoryError:
            if len(images_BHWC) == 1:
                raise
        # Outside the handler, whose traceback would keep the memory.
        torch.cuda.empty_cache()
        half = len(images_BHWC) // 2
        return np.concatenate([self.embed(images_BHWC[:half]), self.embed(images_BHWC[half:])])

    def _embed(self, images_BHWC: Pixels | torch.Tensor) -> Features:
        import torch

        pixels = self._to_device(images_BHWC) if isinstance(images_BHWC, np.ndarray) else images_BHWC
        reduced = self._dtype != torch.float32
        with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=reduced):
            scaled = (pixels.float() / 255.0 - self._mean) / self._std
            features = self._forward(scaled.permute(0, 3, 1, 2).contiguous(memory_format=self._layout))
            result: Features = features.to(torch.float16).cpu().numpy()
        return result


class SeveralBackbones:
    """Backbones side by side over the same images, one for each feature set. `views` are their preprocessing; pixels
    hold each different view once."""

    def __init__(self, backbones: Sequence[Backbone], views: Sequence[Preprocessing]) -> None:
        self.batch_size: int = min(backbone.batch_size for backbone in backbones)
        self._backbones = backbones
        self._pixels = common_preprocessing(views)
        self._places = [self._pixels.views.index(view) for view in views]

    def load(self, images_BHWC: Pixels) -> list[Any]:
        pixels = self._pixels
        pictures = pixels.split(images_BHWC) if isinstance(pixels, SeveralViews) else [images_BHWC]
        pairs = zip(self._backbones, self._places, strict=True)
        return [backbone.load(pictures[place]) for backbone, place in pairs]

    def embed(self, images_BHWC: Pixels | list[Any]) -> Features:
        loaded = images_BHWC if isinstance(images_BHWC, list) else self.load(images_BHWC)
        pairs = zip(self._backbones, loaded, strict=True)
        return np.concatenate([backbone.embed(images) for backbone, images in pairs], axis=1)


Backbone = PixelsBackbone | TimmBackbone | SeveralBackbones
"""Turns images into features. Images do not change its state."""


def find_batch_size(
    embed: Callable[[Pixels], Features], shape: tuple[int, ...], clock: Callable[[], float] = time.perf_counter
) -> int:
    """The batch size beyond which a larger one gains next to nothing, by trying with images of this shape. Insufficient
    memory shows as no gain, since :class:`TimmBackbone` then halves the batch."""
    best, best_rate, size = MIN_BATCH_SIZE, 0.0, MIN_BATCH_SIZE
    while size <= MAX_BATCH_SIZE:
        images = np.zeros((size, *shape), dtype=np.uint8)
        embed(images)  # the first of a size also chooses kernels
        started = clock()
        embed(images)
        embed(images)
        rate = 2 * size / max(clock() - started, 1e-9)
        if rate < MIN_GAIN * best_rate:
            break
        best, best_rate, size = size, rate, 2 * size
    return best


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
