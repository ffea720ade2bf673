"""timm's own test models (64 wide, milliseconds) stand for the large ones."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from icce_ray.config import Config
from icce_ray.embed import backbone_plan, timm_models, weights
from icce_ray.embed.backbone_plan import check_backbones, embed_settings, plan_backbone
from icce_ray.embed.networks import build_backbone
from icce_ray.errors import ConfigError, ResourceError
from icce_ray.images.decoding import decode_image


def build(config: Config, **options: Any) -> Any:
    return build_backbone(config.embed, config.seed, **options)


def settings_of(config: Config) -> dict[str, Any]:
    return embed_settings(config.embed, config.embeddings, config.seed)


def check(config: Config) -> None:
    check_backbones(config.embed)


def config_for(backbone: str = "test_vit", seed: int = 0, **embed: Any) -> Config:
    embed = {"weights": "random", "image_size": 64, "precision": "float32"} | embed
    return Config(output="x", num_clusters=2, seed=seed, images={"uri": "x"}, embed={"backbone": backbone} | embed)


def random_images(count: int = 5, size: int = 64, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def seeded(name: str, seed: int = 0, **options: Any) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(name, num_classes=0, **options).eval()


def normalised(model: torch.nn.Module, images: np.ndarray) -> torch.Tensor:
    data = resolve_model_data_config(model)
    scaled = (images.astype(np.float32) / 255 - np.array(data["mean"], np.float32)) / np.array(data["std"], np.float32)
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy())


def reference_tokens(model: Any, images_BCHW: torch.Tensor) -> list[torch.Tensor]:
    """The tokens after each block, each through the final norm, as a plain walk through the model."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images_BCHW))))
    tokens = []
    for block in model.blocks:
        x = block(x)
        tokens.append(model.norm(x))
    return tokens


@pytest.mark.parametrize("features", ["cls", "cls+patch_mean", "last4", "last4+patch_mean", "auto"])
def test_the_features_of_a_vision_transformer_are_those_of_a_plain_walk_through_its_blocks(features: str) -> None:
    images = random_images()
    name = "vit_tiny_patch16_224"
    model = seeded(name, img_size=64, depth=12)
    with torch.inference_mode():
        tokens = reference_tokens(model, normalised(model, images))
    wanted = [tokens[-1][:, 0]] if not features.startswith("last4") else [block[:, 0] for block in tokens[-4:]]
    if features.endswith("patch_mean") or features == "auto":
        wanted.append(tokens[-1][:, 1:].mean(1))
    expected = torch.cat(wanted, 1).numpy()
    config = config_for(name, features=features)
    result = build(config).embed(images)
    assert result.dtype == np.float16
    assert result.shape == expected.shape == (5, plan_backbone(config.embed).dim)
    np.testing.assert_allclose(result, expected, atol=2e-3)


def test_register_tokens_are_no_patches() -> None:
    name = "vit_small_patch14_reg4_dinov2"
    plan = plan_backbone(config_for(name, features="cls+patch_mean", image_size=28).embed)
    assert plan.dim == 2 * 384
    model = seeded(name, img_size=28)
    images = random_images(2, 28)
    with torch.inference_mode():
        tokens = model.forward_features(normalised(model, images))
    assert tokens.shape[1] == 1 + 4 + 4
    result = build(config_for(name, features="cls+patch_mean", image_size=28)).embed(images)
    np.testing.assert_allclose(result[:, 384:], tokens[:, 5:].mean(1).numpy(), atol=2e-3)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_a_model_without_tokens_gives_its_pooled_features(name: str) -> None:
    images = random_images()
    model = seeded(name)
    with torch.inference_mode():
        expected = model(normalised(model, images)).numpy()
    config = config_for(name)
    assert plan_backbone(config.embed).dim == expected.shape[1]
    np.testing.assert_allclose(build(config).embed(images), expected, rtol=2e-3, atol=2e-3)
    assert plan_backbone(config_for(name).embed).features == "pooled"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were made, with an empty cache."""
    monkeypatch.setenv("ICCE_CACHE", str(tmp_path))
    made: list[str] = []

    def create(name: str, size: int) -> Any:
        made.append(name)
        return original(name, size)

    original = timm_models.create_model
    monkeypatch.setattr(timm_models, "create_model", create)
    return made


def test_a_plan_is_made_once_for_each_question(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[dict[str, Any]] = [{}, {"features": "last4"}, {"image_size": 96}]
    first = [plan_backbone(config_for("test_vit", **question).embed) for question in questions]
    assert len(asked) == 3
    assert len({plan.dim for plan in first}) == 2
    assert [plan_backbone(config_for("test_vit", **question).embed) for question in questions] == first
    assert len(asked) == 3
    monkeypatch.setattr(backbone_plan, "version", lambda _: "another timm")
    assert plan_backbone(config_for("test_vit").embed) == first[0]
    assert len(asked) == 4


def test_a_plan_that_was_damaged_or_cannot_be_kept_is_made_again(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_backbone(config_for("test_vit").embed)
    (kept,) = (tmp_path / "backbones").iterdir()
    for damaged in (b"", b"{}", kept.read_bytes().replace(b"dim", b"din")):
        kept.write_bytes(damaged)
        assert plan_backbone(config_for("test_vit").embed) == plan
    assert len(asked) == 4
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("ICCE_CACHE", str(tmp_path / "file"))
    assert plan_backbone(config_for("test_vit").embed) == plan
    assert len(asked) == 5


def test_what_lies_elsewhere_may_change_and_is_planned_each_time(asked: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(Exception, match="nowhere"):
            plan_backbone(config_for(f"local-dir:{tmp_path}/nowhere").embed)
    assert len(asked) >= 2
    assert not (tmp_path / "backbones").exists()


def test_a_plan_that_is_known_needs_no_timm(asked: list[str]) -> None:
    plan_backbone(config_for("test_vit").embed)
    code = (
        "import sys\n"
        "from icce_ray.config import Config\n"
        "from icce_ray.embed.backbone_plan import check_backbones\n"
        "embed = {'backbone': 'test_vit', 'image_size': 64, 'weights': 'random'}\n"
        "check_backbones(Config(output='x', num_clusters=2, images={'uri': 'x'}, embed=embed).embed)\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pixels_are_flattened_and_scaled_to_one_without_torch() -> None:
    code = (
        "import sys, numpy as np\n"
        "from icce_ray.config import Config\n"
        "from icce_ray.embed.backbone_plan import check_backbones, embed_settings\n"
        "from icce_ray.embed.networks import build_backbone\n"
        "c = Config(output='x', num_clusters=2, images={'uri': 'x'}, embed={'backbone': 'pixels', 'image_size': 8})\n"
        "check_backbones(c.embed), embed_settings(c.embed, c.embeddings, c.seed)\n"
        "images = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)\n"
        "features = build_backbone(c.embed, c.seed).embed(images)\n"
        "assert features.shape == (2, 192) and features.dtype == np.float16\n"
        "assert np.array_equal(features, (images.reshape(2, -1) / 255).astype(np.float32).astype(np.float16))\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules and 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("grayscale", "dim"), [(False, 32 * 32 * 3), (True, 32 * 32)])
def test_pixels_are_32_x_32_unless_told(grayscale: bool, dim: int) -> None:
    plan = plan_backbone(config_for("pixels", weights=None, image_size=None, grayscale=grayscale).embed)
    assert (plan.dim, plan.name, plan.preprocessing.size) == (dim, "pixels", 32)


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch14_dinov2.lvd142m", "resnet18", "dm_nfnet_f0"])
@pytest.mark.parametrize("shape", [(240, 180), (77, 200), (112, 112)])
def test_the_preprocessing_is_the_models_own(name: str, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    with torch.device("meta"):
        data = resolve_model_data_config(timm.create_model(name))
    data["input_size"] = (3, 112, 112)
    transform = create_transform(**data, is_training=False)
    expected = transform(Image.fromarray(pixels)) * torch.tensor(data["std"]).view(3, 1, 1)
    expected = (expected + torch.tensor(data["mean"]).view(3, 1, 1)) * 255
    plan = plan_backbone(config_for(name, image_size=112).embed)
    result = decode_image(sink.getvalue(), plan.preprocessing)
    assert isinstance(result, np.ndarray)
    assert np.array_equal(result, np.rint(expected.permute(1, 2, 0).numpy()).astype(np.uint8))


def test_random_weights_depend_on_the_seed_alone_and_leave_the_global_generator_alone() -> None:
    images = random_images()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = build(config_for(seed=1)).embed(images)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(first, build(config_for(seed=1)).embed(images))
    assert not np.array_equal(first, build(config_for(seed=2)).embed(images))


def test_images_in_shared_memory_are_not_written_to() -> None:
    images = random_images()
    kept = images.copy()
    images.flags.writeable = False
    build(config_for()).embed(images)
    assert np.array_equal(images, kept)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("with_head", [False, True])
def test_weights_come_from_a_local_file(tmp_path: Path, ending: str, with_head: bool) -> None:
    model = timm.create_model("test_vit", num_classes=1000 if with_head else 0, img_size=64)
    path = tmp_path / f"w.{ending}"
    if ending == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"model": {f"module.{key}": value for key, value in model.state_dict().items()}, "epoch": 3}, path)
    images = random_images()
    with torch.inference_mode():
        tokens = model.eval().forward_features(normalised(model, images))
    result = build(config_for(weights=str(path), features="cls")).embed(images)
    np.testing.assert_allclose(result, tokens[:, 0].numpy(), atol=2e-3)


def test_weights_for_another_image_size_have_their_positions_resampled(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=0, img_size=160)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    result = build(config_for(weights=str(tmp_path / "w.safetensors"))).embed(random_images())
    assert np.isfinite(result).all()


class _Code:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def _save_other_model(path: Path) -> None:
    save_file(timm.create_model("test_resnet").state_dict(), path)


def _save_deeper_model(path: Path) -> None:
    model = timm.create_model("test_vit", img_size=64, depth=8)
    save_file(model.state_dict(), path)


def _save_wider_model(path: Path) -> None:
    save_file(timm.create_model("test_vit", img_size=64, embed_dim=128).state_dict(), path)


def _save_less(path: Path) -> None:
    state = timm.create_model("test_vit", img_size=64).state_dict()
    del state["blocks.1.norm1.weight"]
    save_file(state, path)


UNFIT = {
    "another model": (
        _save_other_model,
        "w.safetensors",
        [
            "does not fit test_vit",
            'Missing key(s) in state_dict: "cls_token", "pos_embed"',
            'Unexpected key(s) in state_dict: "bn1.',
        ],
    ),
    "a wider one": (_save_wider_model, "w.safetensors", ["size mismatch for cls_token", "[1, 1, 128]", "[1, 1, 64]"]),
    "a deeper one": (_save_deeper_model, "w.safetensors", ['Unexpected key(s) in state_dict: "blocks.6', "[...]"]),
    "a key is missing": (_save_less, "w.safetensors", ['Missing key(s) in state_dict: "blocks.1.norm1.weight"']),
    "not safetensors": (lambda path: path.write_bytes(b"no"), "w.safetensors", ["cannot be read"]),
    "code": (
        lambda path: path.write_bytes(pickle.dumps({"a": _Code()})),
        "w.pth",
        ["more than weights|cannot be read"],
    ),
    "code in a zip": (lambda path: torch.save({"a": _Code()}, path), "w.pth", ["holds more than weights"]),
    "no tensors": (lambda path: torch.save({"a": 1}, path), "w.pth", ["holds no tensors by name"]),
}


@pytest.mark.parametrize("case", UNFIT)
def test_weights_that_do_not_fit_are_refused_naming_the_keys(tmp_path: Path, case: str, capfd: Any) -> None:
    save, name, words = UNFIT[case]
    save(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        build(config_for(weights=str(tmp_path / name)))
    assert "embed.weights" in str(caught.value)
    for word in words:
        assert any(option in str(caught.value) for option in word.split("|")), str(caught.value)
    assert "this must not run" not in capfd.readouterr().out


WRONG = {
    "unknown model": (
        {"backbone": "vit_tinny_patch16_224"},
        ["no model 'vit_tinny_patch16_224'", "vit_tiny_patch16_224"],
    ),
    "nearly pixels": ({"backbone": "pixel"}, ["close: pixels"]),
    "unknown tag": ({"backbone": "resnet18.nosuch"}, ["no such weights tag", "resnet18.a1_in1k"]),
    "no tokens": ({"backbone": "test_resnet", "features": "cls"}, ["has no class token", "use 'pooled'"]),
    "pixels have no cls": ({"backbone": "pixels", "features": "cls", "weights": None}, ["embed.features: 'cls'"]),
    "pixels have no weights": ({"backbone": "pixels"}, ["embed.weights: 'random'"]),
    "three channels": ({"grayscale": True}, ["embed.grayscale", "three channels"]),
    "wrong size": ({"image_size": 50}, ["embed.image_size", "50 pixels"]),
    "no such file": ({"weights": "nowhere.safetensors"}, ["there is no file nowhere.safetensors"]),
    "other ending": ({"weights": "w.npz"}, ["does not end in .safetensors"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_backbone_that_cannot_work_is_refused_before_any_work(case: str) -> None:
    embed, words = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        check(config_for(**embed))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_without_a_network_the_remedy_is_named_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_name(*args: Any) -> Any:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(weights.socket, "getaddrinfo", no_name)
    with pytest.raises(ResourceError, match=r"could not be fetched.*--set embed\.weights=FILE.*backbone=pixels"):
        check(config_for(weights=None))
    with pytest.raises(ConfigError, match="no weights for vit_base_patch16_18x2_224"):
        check(config_for("vit_base_patch16_18x2_224", weights=None))


def test_the_settings_of_ready_made_embeddings_name_no_backbone() -> None:
    config = Config(output="x", num_clusters=2, embeddings={"uri": "e.npy"}, embed={"backbone": "no such model"})
    assert settings_of(config) == {"embeddings": {"column": None}}


def test_the_fingerprint_sees_the_weights_content_and_not_their_path(tmp_path: Path) -> None:
    for name, content in (("a.pth", b"1"), ("b.pth", b"1"), ("c.pth", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (settings_of(config_for(weights=str(tmp_path / name))) for name in ("a.pth", "b.pth", "c.pth"))
    assert a == b != c


def test_the_fingerprint_sees_all_that_changes_features_and_nothing_else() -> None:
    same = [{}, {"batch_size": 3}, {"max_error_rate": 0.5}, {"compile": True}]
    assert len({str(settings_of(config_for(**embed))) for embed in same}) == 1
    assert settings_of(config_for(image_size=None)) == settings_of(config_for(image_size=224))
    other = [{"backbone": "test_vit2"}, {"features": "cls"}, {"image_size": 48}, {"seed": 1}]
    other += [
        {"weights": None},
        {"max_image_pixels": 5},
        {"backbone": "pixels"},
        {"backbone": "pixels", "grayscale": True},
        {"precision": "bfloat16"},
        {"extra": [{"backbone": "pixels"}]},
        {"extra": [{"backbone": "pixels", "image_size": 8}]},
    ]
    assert len({str(settings_of(config_for(**embed))) for embed in [{}, *other]}) == 1 + len(other)
    assert settings_of(config_for("pixels", seed=1)) == settings_of(config_for("pixels"))
    pixels = {"backbone": "pixels", "image_size": 32, "max_image_pixels": 100_000_000}
    assert settings_of(config_for("pixels", image_size=None)) == {"embed": pixels | {"grayscale": False}}
