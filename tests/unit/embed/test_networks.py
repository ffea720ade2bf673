"""How networks are run: precision, memory, batch size, several side by side."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from icce_ray.config import Config
from icce_ray.embed.backbone_plan import check_backbones, plan_embedding
from icce_ray.embed.decode_and_embed import DecodedPart, embed_contents
from icce_ray.embed.networks import MAX_BATCH_SIZE, TimmBackbone, build_backbone, common_preprocessing, find_batch_size
from icce_ray.errors import ConfigError
from icce_ray.images.preprocessing import Preprocessing, SeveralViews
from icce_ray.runtime.machine import matmul_dtype

CPU = torch.device("cpu")


def build(config: Config, **options: Any) -> Any:
    return build_backbone(config.embed, config.seed, **options)


def check(config: Config) -> None:
    check_backbones(config.embed)


def config_for(**embed: Any) -> Config:
    embed = {"backbone": "test_vit", "weights": "random", "image_size": 64} | embed
    return Config(output="x", num_clusters=2, images={"uri": "x"}, embed=embed)


def random_images(count: int = 6, size: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def embedded(backbone: str, **embed: Any) -> np.ndarray:
    return build(config_for(backbone=backbone, **embed)).embed(random_images())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "features"), [("test_vit", "cls+patch_mean"), ("test_vit", "last4"), ("test_convnext", "auto")]
)
def test_half_precision_gives_nearly_the_features_of_float32(name: str, features: str, precision: str) -> None:
    exact = embedded(name, features=features, precision="float32").astype(np.float32)
    half = embedded(name, features=features, precision=precision)
    assert half.dtype == np.float16
    assert not np.array_equal(half, exact)
    assert np.linalg.norm(half - exact) < 0.02 * np.linalg.norm(exact)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_weights_are_held_in_the_reduced_precision_and_give_the_bits_of_autocast(name: str, precision: str) -> None:
    half, full = (build(config_for(backbone=name, precision=each)) for each in (precision, "float32"))
    kinds = {p.dtype for m in half._model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d) for p in m.parameters()}  # fmt: skip  # noqa: E501
    assert kinds == {getattr(torch, precision)}
    half_bytes, full_bytes = (sum(p.nbytes for p in each._model.parameters()) for each in (half, full))
    assert half_bytes < 0.51 * full_bytes
    assert {p.dtype for p in full._model.parameters()} == {torch.float32}
    full._dtype = half._dtype  # autocast then casts the weights in each pass
    assert np.array_equal(half.embed(random_images()), full.embed(random_images()))


def test_auto_is_bfloat16_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert matmul_dtype("auto", CPU) == getattr(torch, expected)
        assert np.array_equal(embedded("test_vit", precision="auto"), embedded("test_vit", precision=expected))


def broken_vit(scale: float, precision: str) -> Any:
    """A network whose class token is `scale` times too large."""
    backbone: Any = build(config_for(features="cls", precision=precision))
    with torch.no_grad():
        backbone._model.norm.weight *= scale
    return backbone


def outcomes_of(backbone: TimmBackbone) -> list[Any]:
    """The outcomes of six random images."""
    hashes = list("abcdef")
    decoded = DecodedPart(np.arange(6), np.arange(6, dtype=np.int32), random_images(), hashes, [])
    outcomes = embed_contents(decoded, hashes, backbone.embed, 4)
    return [outcomes[content] for content in hashes]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_features_beyond_float16_cost_the_image_and_are_called_so(precision: str) -> None:
    assert outcomes_of(broken_vit(1e6, precision)) == ["feature overflow"] * 6


def test_a_network_that_overflows_inside_costs_its_images() -> None:
    backbone = broken_vit(1.0, "float16")
    with torch.no_grad():
        backbone._model.blocks[0].mlp.fc1.weight *= 1e7
    assert outcomes_of(backbone) == ["feature not a number"] * 6


def test_a_batch_that_does_not_fit_is_halved_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build(config_for(precision="float32"))
    assert isinstance(backbone, TimmBackbone)
    whole = backbone.embed(random_images(11))
    original, sizes = backbone._embed, []

    def little_memory(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        if len(images) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(images)

    monkeypatch.setattr(backbone, "_embed", little_memory)
    limit = 3
    np.testing.assert_allclose(backbone.embed(random_images(11)), whole, atol=1e-3)
    assert sizes == [11, 5, 2, 3, 6, 3, 3]
    limit = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        backbone.embed(random_images(2))


def test_a_batch_that_does_not_fit_on_its_way_to_the_device_is_halved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build(config_for(precision="float32"))
    whole = backbone.embed(random_images(11))
    original = torch.from_numpy

    def little_memory(images: np.ndarray) -> torch.Tensor:
        if len(images) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(images)

    monkeypatch.setattr(torch, "from_numpy", little_memory)
    limit = 3
    np.testing.assert_allclose(backbone.embed(backbone.load(random_images(11))), whole, atol=1e-3)
    limit = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        backbone.embed(backbone.load(random_images(2)))


@pytest.mark.parametrize(("saturates_at", "expected"), [(16, 16), (128, 128), (10**9, MAX_BATCH_SIZE)])
def test_the_batch_is_doubled_for_as_long_as_that_is_faster(saturates_at: int, expected: int) -> None:
    now, shapes = 0.0, []

    def embed(images: np.ndarray) -> np.ndarray:
        nonlocal now
        shapes.append(images.shape)
        now += max(1.0, len(images) / saturates_at)  # a device that is not full takes as long for fewer
        return np.zeros((len(images), 1), np.float16)

    assert find_batch_size(embed, (8, 8, 3), clock=lambda: now) == expected
    assert max(shapes)[0] == min(2 * expected, MAX_BATCH_SIZE)
    assert {shape[1:] for shape in shapes} == {(8, 8, 3)}


def test_the_batch_size_is_what_is_given_and_64_on_a_cpu() -> None:
    assert build(config_for()).batch_size == 64
    assert build(config_for(batch_size=7)).batch_size == 7
    assert build(config_for(batch_size=7, extra=[{"backbone": "pixels"}])).batch_size == 7


def test_several_backbones_give_their_features_side_by_side() -> None:
    settings: list[dict[str, Any]] = [
        {"backbone": "test_vit", "weights": "random", "image_size": 64, "features": "last4"},
        {"backbone": "pixels", "weights": None, "image_size": 8},
        {"backbone": "test_resnet", "weights": "random", "image_size": 64},
        {"backbone": "test_vit", "weights": "random", "image_size": 64, "features": "cls"},
    ]
    config = config_for(**settings[0], extra=settings[1:], precision="float32")
    plan = plan_embedding(config.embed)
    assert plan.names == ["test_vit:last4", "pixels", "test_resnet:pooled", "test_vit:cls"]
    assert isinstance(plan.preprocessing, SeveralViews)
    assert len(plan.preprocessing.views) == len(set(plan.preprocessing.views)) < 4

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, *plan.preprocessing.shape), dtype=np.uint8)
    pictures = dict(zip(plan.preprocessing.views, plan.preprocessing.split(pixels), strict=True))
    features = build(config).embed(pixels)
    assert features.shape == (5, sum(plan.dims))
    columns = np.split(features, np.cumsum(plan.dims)[:-1], axis=1)
    for one, planned, column in zip(settings, plan.backbones, columns, strict=True):
        alone = build(config_for(**one, precision="float32"))
        assert np.array_equal(alone.embed(pictures[planned.preprocessing]), column)


def test_backbones_that_want_the_same_pixels_share_them() -> None:
    same = Preprocessing(64, 64, "bicubic")
    assert common_preprocessing([same, Preprocessing(64, 64, "bicubic")]) == same
    extra = [{"backbone": "test_vit", "weights": "random", "image_size": 64, "features": "cls"}]
    config = config_for(extra=extra)
    assert isinstance(plan_embedding(config.embed).preprocessing, Preprocessing)
    features = build(config).embed(random_images())
    assert np.array_equal(features[:, :64], features[:, 128:])


def test_what_is_wrong_with_a_further_backbone_says_with_which() -> None:
    with pytest.raises(ConfigError, match=r"^embed\.extra\[1\]: embed\.backbone: timm has no model 'vitt'"):
        check(config_for(extra=[{"backbone": "pixels"}, {"backbone": "vitt"}]))


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and run by PyTorch: code for a CPU, which nobody compiles a network for, would take ten seconds."""
    import timm

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    model: Any = timm.create_model("test_vit", num_classes=0, img_size=64, depth=1)
    backbone = TimmBackbone(model, "cls+patch_mean", "cpu", "float32")
    images = random_images()
    plain = backbone.embed(images)
    backbone.compile()
    np.testing.assert_allclose(backbone.embed(images), plain, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_gpu_gives_the_features_of_a_cpu_in_batches_of_its_own_size(name: str) -> None:
    exact = embedded(name, precision="float32").astype(np.float32)
    for precision in ("float32", "bfloat16", "float16"):
        backbone = build(config_for(backbone=name, precision=precision), device="cuda")
        assert 16 <= backbone.batch_size <= MAX_BATCH_SIZE
        assert np.linalg.norm(backbone.embed(random_images()) - exact) < 0.02 * np.linalg.norm(exact)
