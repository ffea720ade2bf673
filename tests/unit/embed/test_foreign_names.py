from __future__ import annotations

import pytest
import timm

from icce_ray.config import BackboneConfig
from icce_ray.embed.backbone_plan import plan_backbone
from icce_ray.embed.timm_models import timm_name
from icce_ray.errors import ConfigError

NAMES = {
    "dinov2_vits14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_vitg14_reg": "vit_giant_patch14_reg4_dinov2.lvd142m",
    "facebook/dinov2-base": "vit_base_patch14_dinov2.lvd142m",
    "facebook/dinov2-with-registers-large": "vit_large_patch14_reg4_dinov2.lvd142m",
    "facebook/dinov2-small-imagenet1k-1-layer": "vit_small_patch14_dinov2.lvd142m",
    "dinov3_vitl16": "vit_large_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vitsplus16-pretrain-lvd1689m": "vit_small_plus_patch16_dinov3.lvd1689m",
    "facebook/dinov3-convnext-tiny-pretrain-lvd1689m": "convnext_tiny.dinov3_lvd1689m",
    "dino_vitb8": "vit_base_patch8_224.dino",
    "facebook/dino-vits16": "vit_small_patch16_224.dino",
    "ViT-L/14": "vit_large_patch14_clip_224.openai",
    "ViT-L/14@336px": "vit_large_patch14_clip_336.openai",
    "ViT-B-32": "vit_base_patch32_clip_224.openai",
    "openai/clip-vit-base-patch16": "vit_base_patch16_clip_224.openai",
    "openai/clip-vit-large-patch14-336": "vit_large_patch14_clip_336.openai",
    "RN50x4": "resnet50x4_clip.openai",
    "google/siglip-base-patch16-224": "vit_base_patch16_siglip_224.webli",
    "google/vit-base-patch16-224-in21k": "vit_base_patch16_224",
    "facebook/vit-mae-base": "vit_base_patch16_224.mae",
    "microsoft/resnet-50": "resnet50",
    "timm/vit_tiny_patch16_224.augreg_in21k": "vit_tiny_patch16_224.augreg_in21k",
    "vit_b_16": "vit_base_patch16_224",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "swin_t": "swin_tiny_patch4_window7_224",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_another_project_is_translated_to_one_that_timm_has(name: str) -> None:
    assert timm_name(name) == NAMES[name]
    architecture, _, tag = NAMES[name].partition(".")
    assert timm.is_model(architecture)
    assert not tag or NAMES[name] in timm.list_pretrained(f"{architecture}*")


@pytest.mark.parametrize("name", ["resnet51", "ViT-H/14", "somebody/something"])
def test_other_names_are_unknown(name: str) -> None:
    assert timm_name(name) is None


def test_the_config_is_refused_with_the_name_to_write() -> None:
    with pytest.raises(ConfigError, match=r"timm's name of 'dinov2_vits14' is vit_small_patch14_dinov2\.lvd142m"):
        plan_backbone(BackboneConfig(backbone="dinov2_vits14"))
