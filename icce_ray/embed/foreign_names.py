"""The timm names of backbones that other projects call otherwise."""

from __future__ import annotations

import re

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
