"""JPEGs for the device, decoded by the same calls on the CPU."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from icce_ray.config import Config
from icce_ray.embed.backbone_plan import embed_settings
from icce_ray.embed.decode_and_embed import (
    FILES_TOGETHER,
    DecodedPart,
    decode_on_device,
    decode_part,
    decoded_from_table,
    decoded_to_table,
    is_plain_jpeg,
)
from icce_ray.embed.embedding_parts import PartRange
from icce_ray.embed.stage import EMBED
from icce_ray.errors import ConfigError
from icce_ray.images.decoding import decode_image
from icce_ray.images.listing import ListedImage
from icce_ray.images.preprocessing import Preprocessing, SeveralViews

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
VIEW = Preprocessing(size=28, scale_size=32, interpolation="bicubic")
VIEWS = [VIEW, Preprocessing(16, 24, squash=True), SeveralViews((VIEW, Preprocessing(16, 24)))]


def picture(seed: int, width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(seed).integers(256, size=(5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=95, **options)
    return sink.getvalue()


def files_of(number: int) -> list[bytes]:
    return [jpeg(picture(seed, 40 + seed, 70 - seed, "RGB" if seed % 3 else "L")) for seed in range(number)]


@pytest.mark.parametrize("view", VIEWS)
def test_the_pixels_are_nearly_those_of_pillow(view: Any) -> None:
    files = files_of(2 * FILES_TOGETHER + 3)
    for data, pixels in zip(files, decode_on_device(files, view, "cpu"), strict=True):
        expected = decode_image(data, view)
        assert isinstance(expected, np.ndarray)
        assert isinstance(pixels, np.ndarray)
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected.astype(int)).mean() < 2


def test_what_the_device_refuses_is_decoded_by_pillow_and_changes_no_other_image() -> None:
    files = files_of(20)
    damaged = files[7][:300] + bytes(200) + b"\xff\xd9"
    cmyk = jpeg(picture(1, mode="CMYK"))
    found = decode_on_device([*files[:7], damaged, cmyk, *files[7:]], VIEW, "cpu")
    assert found[7] == decode_image(damaged, VIEW) or isinstance(found[7], np.ndarray)
    np.testing.assert_array_equal(found[:7] + found[9:], decode_on_device(files, VIEW, "cpu"))
    assert decode_on_device([b"\xff\xd8\xff no"], VIEW, "cpu") == [decode_image(b"\xff\xd8\xff no", VIEW)]


def test_only_plain_jpegs_are_for_the_device() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, png = jpeg(picture(0)), io.BytesIO()
    picture(0).save(png, "PNG")
    assert is_plain_jpeg(plain, VIEW, 2400)
    assert is_plain_jpeg(jpeg(picture(0, mode="L")), VIEW, 2400)
    assert not is_plain_jpeg(plain, VIEW, 2399)
    assert not is_plain_jpeg(plain, Preprocessing(28, 32, "lanczos"), 2400)
    assert not is_plain_jpeg(plain, Preprocessing(28, 32, grayscale=True), 2400)
    for other in (
        jpeg(picture(0), exif=exif),
        jpeg(picture(0, mode="CMYK")),
        jpeg(picture(0, 400, 6)),
        png.getvalue(),
        plain[:-100],
        plain[:2] + 17 * (b"\xff\xfe\xff\xff" + bytes(65533)) + plain[2:],
    ):
        assert not is_plain_jpeg(other, VIEW, 10**6)


def decoded(folder: Path, files: list[bytes], *, keep_jpegs: bool) -> DecodedPart:
    images = []
    for number, data in enumerate(files):
        (folder / f"{number}").write_bytes(data)
        images.append(ListedImage(number, str(folder / f"{number}"), len(data), None, None))
    part = PartRange(0, 0, len(files))
    result = decode_part(part, images, VIEW, max_pixels=10**6, keep_jpegs=keep_jpegs)
    return decoded_from_table(decoded_to_table(part, result))[1]


def test_jpegs_of_a_part_wait_for_the_device_and_damaged_ones_become_errors(tmp_path: Path) -> None:
    png = io.BytesIO()
    picture(50).save(png, "PNG")
    broken = b"\xff\xd8\xff" + bytes(50)
    jpegs = files_of(5)
    files = [jpegs[0], png.getvalue(), jpegs[1], jpegs[0], broken, jpegs[2]]
    waiting, plain = (decoded(tmp_path, files, keep_jpegs=keep) for keep in (True, False))
    assert (len(waiting.pixels), waiting.jpegs) == (1, (jpegs[0], jpegs[1], jpegs[2]))
    whole = waiting.with_jpegs(lambda files: decode_on_device(files, VIEW, "cpu"))
    assert (whole.hashes, whole.errors, whole.jpegs) == (plain.hashes, plain.errors, ())
    assert whole.image_ids.tolist() == plain.image_ids.tolist() == [0, 1, 2, 3, 5]
    difference = whole.pixels[whole.rows].astype(int) - plain.pixels[plain.rows].astype(int)
    assert np.abs(difference).mean() < 2
    assert not difference[1].any()
    failing = waiting.with_jpegs(lambda files: ["truncated", *decode_on_device(files[1:], VIEW, "cpu")])
    assert failing.errors == sorted([*plain.errors, (0, "truncated"), (3, "truncated")])
    assert failing.image_ids.tolist() == [1, 2, 5]
    np.testing.assert_array_equal(failing.pixels[failing.rows], whole.pixels[whole.rows[[1, 2, 4]]])


def test_the_decoder_is_in_the_fingerprint_and_refused_without_a_gpu() -> None:
    base: dict[str, Any] = {"images": {"uri": "/data"}, "num_clusters": 2, "output": "/out"}
    plain, other = (Config.model_validate(base | {"embed": embed}) for embed in ({}, {"decoder": "nvjpeg"}))
    settings = [embed_settings(config.embed, config.embeddings, 0) for config in (plain, other)]
    assert settings[0] != settings[1]
    assert "decoder" not in settings[0]
    assert EMBED.check is not None
    with pytest.raises(ConfigError, match=r"nvjpeg decodes on GPUs; set resources\.embed\.gpus_per_worker=1"):
        EMBED.check(other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_nearly_the_pixels_of_a_cpu() -> None:
    files = files_of(40)
    on_gpu, on_cpu = (np.stack(decode_on_device(files, VIEW, device)).astype(int) for device in ("cuda", "cpu"))
    assert np.abs(on_gpu - on_cpu).mean() < 2
