"""timm models: build one, find out what it wants and gives, and extract features from it. Backbones that other projects
call otherwise are found by those names too."""

import difflib
import re
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config

from icce_ray.config import PIXELS
from icce_ray.errors import ConfigError
from icce_ray.images.preprocessing import Interpolation, Preprocessing

SIZES = {
    **{"s": "small", "splus": "small_plus", "b": "base", "l": "large"},
    **{"h": "huge", "hplus": "huge_plus", "g": "giant", "7b": "7b"},
}
RULES = (
    # torch.hub: dinov2_vits14_reg; Hugging Face: facebook/dinov2-with-registers-small
    (r"dinov2_vit([sblg])14(?:_lc|_ld)?", r"vit_{}_patch14_dinov2.lvd142m"),
    (r"dinov2_vit([sblg])14_reg(?:_lc|_ld)?", r"vit_{}_patch14_reg4_dinov2.lvd142m"),
    (r"dinov2-(small|base|large|giant)(?:-.*)?", r"vit_{}_patch14_dinov2.lvd142m"),
    (r"dinov2-with-registers-(small|base|large|giant)(?:-.*)?", r"vit_{}_patch14_reg4_dinov2.lvd142m"),
    (r"dinov3[_-]vit(s|splus|b|l|hplus|7b)16(?:-pretrain-lvd1689m)?", r"vit_{}_patch16_dinov3.lvd1689m"),
    (r"dinov3[_-]convnext[_-](tiny|small|base|large)(?:-.*)?", r"convnext_{}.dinov3_lvd1689m"),
    (r"dino[_-]vit([sb])(8|16)", r"vit_{}_patch{}_224.dino"),
    # CLIP: ViT-L/14@336px; OpenCLIP: ViT-L-14-336; Hugging Face: openai/clip-vit-large-patch14-336
    (r"vit-([bl])[/-](14|16|32)(?:-quickgelu)?", r"vit_{}_patch{}_clip_224.openai"),
    (r"clip-vit-(base|large)-patch(14|16|32)", r"vit_{}_patch{}_clip_224.openai"),
    (r"vit-l[/-]14(?:@336px|-336)(?:-quickgelu)?|clip-vit-large-patch14-336", "vit_large_patch14_clip_336.openai"),
    (r"rn(50|101|50x4|50x16|50x64)", r"resnet{}_clip.openai"),
    (r"siglip-(base|large)-patch16-(224|256|384)", r"vit_{}_patch16_siglip_{}.webli"),
    # torchvision and Hugging Face
    (r"vit_([bl])_(16|32)", r"vit_{}_patch{}_224"),
    (r"vit-(base|large)-patch(16|32)-(224|384)(?:-.*)?", r"vit_{}_patch{}_{}"),
    (r"vit-mae-(base|large|huge)", r"vit_{}_patch16_224.mae"),
    (r"resnet-(18|26|34|50|101|152)", r"resnet{}"),
    (r"mobilenet_v2", "mobilenetv2_100"),
    (r"mobilenet_v3_(small|large)", r"mobilenetv3_{}_100"),
    (r"swin_([tsb])", r"swin_{}_patch4_window7_224"),
)
"""Patterns, without the owner of a hub id, and the name in timm, where each group fills one gap."""


def timm_name(name: str) -> str | None:
    """The name that timm has for a backbone of another project, or None if it is not known."""
    known = name.lower().rpartition(":")[2]  # hf_hub:timm/resnet18
    owner, slash, rest = known.rpartition("/")
    if slash and not owner.endswith(("vit-b", "vit-l")):  # CLIP's ViT-L/14 is no hub id
        if owner == "timm":
            return rest
        known = rest
    for pattern, renamed in RULES:
        if found := re.fullmatch(pattern, known):
            long = SIZES | ({"t": "tiny"} if known.startswith("swin") else {})
            return renamed.format(*(long.get(group, group) for group in found.groups()))
    return None


def create_model(name: str, size: int, **options: Any) -> Any:
    """The timm model without its classification layer; for square inputs of `size` if it depends on that. Raises
    ConfigError: no such model (with close matches) or weights tag, or an image size that it cannot take."""
    architecture = name.partition(".")[0]
    if ":" not in name and not timm.is_model(architecture):
        if renamed := timm_name(name):
            raise ConfigError(f"embed.backbone: timm's name of {name!r} is {renamed}: write that")
        close = difflib.get_close_matches(name, [PIXELS, *timm.list_models(), *timm.list_pretrained()], n=5)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ConfigError(f"embed.backbone: timm has no model {name!r}{hint}. Any timm model name works, or {PIXELS!r}")
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


def parameter_names(name: str, size: int) -> set[str]:
    """The names of the model's parameters and buffers, without initialising them if the model permits."""
    try:
        with torch.device("meta"):
            return set(create_model(name, size).state_dict())
    except (NotImplementedError, RuntimeError):  # it reads values while it is built
        return set(create_model(name, size).state_dict())


def probe_features(model: Any, name: str, features: str, example: torch.Tensor) -> tuple[str, int]:
    """The features that `features` stands for, and their dimension, by trying. Raises ConfigError: features that the
    model cannot give, or an image size that it cannot take."""
    features = _choose_features(model, name, features)
    try:
        with torch.inference_mode():
            return features, int(extract_features(model, example, features).shape[1])
    except AssertionError as error:
        raise ConfigError(f"embed.image_size: {name} cannot take {example.shape[-1]} pixels: {error}") from None
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"embed.features: {name} cannot give {features!r}: {error}") from None


def extract_features(model: Any, images_BCHW: torch.Tensor, features: str) -> torch.Tensor:
    """Normalised images -> (B, D) float32; tokens are taken after the model's final norm."""
    if features == "pooled":
        pooled: torch.Tensor = model(images_BCHW)
        return pooled.flatten(1).float()
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
        chosen.append(patches.float().mean(dim=1))
    return torch.cat([token.float() for token in chosen], dim=1)


def data_config(model: Any) -> dict[str, Any]:
    """timm's data config: mean, std, interpolation, crop_pct, crop_mode."""
    settings: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return settings


def model_preprocessing(model: Any, size: int) -> Preprocessing:
    """The model's own preprocessing, for inputs of `size`."""
    data = data_config(model)
    known: dict[str, Interpolation] = {"nearest": "nearest", "bilinear": "bilinear", "lanczos": "lanczos"}
    return Preprocessing(
        size=size,
        scale_size=max(size, int(size / data["crop_pct"])),
        interpolation=known.get(data["interpolation"], "bicubic"),
        squash=data["crop_mode"] == "squash",
    )


def _choose_features(model: Any, name: str, features: str) -> str:
    has_tokens = getattr(model, "cls_token", None) is not None and getattr(model, "num_prefix_tokens", 0) >= 1
    if features == "auto":
        return "cls+patch_mean" if has_tokens else "pooled"
    if features != "pooled" and not has_tokens:
        raise ConfigError(f"embed.features: {name} has no class token, so no {features!r}; use 'pooled'")
    if features.startswith("last4") and not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"embed.features: {name} does not give its last blocks; use 'cls' or 'cls+patch_mean'")
    return features
