from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from icce_ray.images import decoding as images
from icce_ray.images.decoding import decode_image, is_deep_grey
from icce_ray.images.preprocessing import Preprocessing, SeveralViews
from icce_ray.images.read_images import read_image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
WHOLE = Preprocessing(size=16, scale_size=16)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def decoded(data: bytes, preprocessing: Preprocessing = WHOLE) -> np.ndarray:
    pixels = decode_image(data, preprocessing)
    assert isinstance(pixels, np.ndarray), pixels
    assert pixels.dtype == np.uint8
    assert pixels.shape == preprocessing.shape
    return pixels


def noise(height: int = 40, width: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def two_halves(size: int = 16) -> Image.Image:
    """Left dark grey, right light grey."""
    values = np.full((size, size, 3), 40, np.uint8)
    values[:, size // 2 :] = 200
    return Image.fromarray(values)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_a_lossless_image_of_the_right_size_comes_out_as_it_is(kind: str) -> None:
    image = noise(16, 16)
    assert np.array_equal(decoded(encode(image, kind)), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_a_lossy_image_comes_out_nearly_as_it_is(kind: str) -> None:
    image = two_halves()
    assert np.abs(decoded(encode(image, kind)).astype(int) - np.asarray(image)).max() < 12


@pytest.mark.parametrize("grayscale", [False, True])
@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("L", "JPEG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("YCbCr", "JPEG"),
        ("YCbCr", "TIFF"),
        ("LAB", "TIFF"),
        ("I;16", "PNG"),
        ("I;16", "TIFF"),
        ("I;16B", "TIFF"),
        ("I", "TIFF"),
        ("F", "TIFF"),
    ],
)
def test_every_mode_gives_the_same_picture(mode: str, kind: str, grayscale: bool) -> None:
    grey = np.zeros((16, 16), np.uint8)
    grey[:, 8:] = 255
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "I;16B":
        image = Image.frombytes(mode, (16, 16), (grey.astype(">u2") * 257).tobytes())
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    preprocessing = Preprocessing(size=16, scale_size=16, grayscale=grayscale)
    pixels = decoded(encode(image, kind), preprocessing).astype(int)
    assert np.abs(pixels - grey[:, :, None]).max() <= 6


def raw_png(rows: np.ndarray, bit_depth: int, color_type: int) -> bytes:
    """A PNG of a kind that Pillow reads but does not write. `rows`: (height, bytes of a row) uint8."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color_type]
    height, width = len(rows), rows.shape[1] * 8 // (bit_depth * channels)
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    filtered = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(filtered)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_a_channel_lose_their_lower_eight(color_type: int, channels: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 65536, (16, 16, channels), dtype=np.uint16)
    has_alpha = color_type in (4, 6)
    if has_alpha:
        values[..., -1] = 65535
    pixels = decoded(raw_png(values.astype(">u2").view(np.uint8).reshape(16, -1), 16, color_type)).astype(int)
    shown = values[..., :-1] if has_alpha else values
    assert np.abs(pixels - np.rint(shown / 257)).max() <= 1


@pytest.mark.parametrize("bit_depth", [1, 2, 4])
def test_fewer_than_eight_bits_of_grey_reach_from_black_to_white(bit_depth: int) -> None:
    half = 16 * bit_depth // 16
    rows = np.zeros((16, 2 * half), np.uint8)
    rows[:, half:] = 255
    expected = np.zeros((16, 16, 3), np.uint8)
    expected[:, 8:] = 255
    assert np.array_equal(decoded(raw_png(rows, bit_depth, 0)), expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_palette_of_any_depth_gives_its_colours(bits: int) -> None:
    indices = np.zeros((16, 16), np.uint8)
    indices[:, 8:] = 1
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette([250, 10, 20, 5, 100, 200])
    pixels = decoded(encode(image, "PNG", bits=bits))
    assert pixels[3, 3].tolist() == [250, 10, 20]
    assert pixels[3, 12].tolist() == [5, 100, 200]


def test_16_bits_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    pixels = decoded(encode(Image.fromarray(values), "PNG"))
    assert np.array_equal(pixels[:, :, 0], np.rint(values / 257).astype(np.uint8))


@pytest.mark.parametrize("high", [1.0, 1.1, 4095, 65535])
def test_grey_of_more_than_8_bits_is_stretched_whatever_its_range(high: float) -> None:
    values = np.linspace(0, 1, 256).reshape(16, 16) * high
    kind = np.float32 if high < 2 else np.uint16
    pixels = decoded(encode(Image.fromarray(values.astype(kind)), "TIFF"))
    assert np.abs(pixels[:, :, 0].astype(int) - np.arange(256).reshape(16, 16)).max() <= 1


def test_values_that_are_not_finite_do_not_change_the_others() -> None:
    values = np.linspace(2, 3, 256, dtype=np.float32).reshape(16, 16)
    expected = decoded(encode(Image.fromarray(values), "TIFF")).copy()
    values[3, :3] = np.nan, np.inf, -np.inf
    expected[3, :3] = np.array([[0], [255], [0]])
    assert np.array_equal(decoded(encode(Image.fromarray(values), "TIFF")), expected)


def with_tag(tiff: bytes, tag: int, value: int) -> bytes:
    """The TIFF with another value of a short tag."""
    place = tiff.index(struct.pack("<HHI", tag, 3, 1)) + 8
    return tiff[:place] + struct.pack("<H", value) + tiff[place + 2 :]


@pytest.mark.parametrize("orientation", [1, 6])
def test_grey_without_a_sign_and_grey_whose_least_is_white(orientation: int) -> None:
    values = np.arange(256, dtype=np.uint32).reshape(16, 16)
    tags = {"tiffinfo": {274: orientation}}
    plain = encode(Image.fromarray(values.astype(np.uint16)), "TIFF", **tags)
    large = encode(Image.fromarray((values * 2**24).view(np.int32)), "TIFF", **tags)
    assert np.array_equal(decoded(with_tag(large, 339, 1)), decoded(plain))
    assert np.array_equal(decoded(with_tag(plain, 262, 0)), 255 - decoded(plain))


@pytest.mark.parametrize("kind", ["text", "compressed text", "profile"])
def test_large_metadata_does_not_cost_the_image(kind: str) -> None:
    info = PngInfo()
    if kind != "profile":
        info.add_text("comment", "x" * 2_000_000, zip=kind == "compressed text")
    profile = {"icc_profile": bytes(2_000_000)} if kind == "profile" else {}
    image = noise(16, 16)
    assert np.array_equal(decoded(encode(image, "PNG", pnginfo=info, **profile)), np.asarray(image))


def test_only_the_promised_formats_are_opened() -> None:
    eps = encode(two_halves(), "EPS")
    assert decode_image(eps, WHOLE) == "EPS: not supported; render to PNG"
    assert decode_image(encode(two_halves(), "ICO"), WHOLE) == "ICO: not supported; convert to PNG or TIFF"
    assert decode_image(b"<!DOCTYPE html><html>", WHOLE) == "a web page, not an image"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    assert decode_image(pointer, WHOLE) == "a Git LFS pointer, not the file; fetch it with git lfs pull"
    assert images.convert_image(Image.open(io.BytesIO(eps)), WHOLE) == "EPS: not supported"
    for kind in ("JPEG2000", "PPM", "AVIF", "DIB"):
        assert decode_image(encode(two_halves(), kind), WHOLE).shape == (16, 16, 3)


def test_what_pillow_cannot_decode_says_so() -> None:
    assert str(decode_image(b"\0\0\0\x18ftypheic" + bytes(100), WHOLE)).startswith("HEIC: not supported; convert")
    assert str(decode_image(b"\0\0\0\x18ftypcrx " + bytes(100), WHOLE)).startswith("RAW: not supported; convert")
    doubles = with_tag(encode(Image.fromarray(np.ones((16, 16), np.float32)), "TIFF"), 258, 64)
    assert str(decode_image(doubles, WHOLE)).startswith("TIFF: pixels of this type are not supported; convert")
    assert decode_image(bytes(128) + b"DICM" + bytes(9), WHOLE) == "DICOM: not supported; convert to PNG or TIFF"
    for start, name in ((b"DDS ", "DDS"), (b"#?RADIANCE", "HDR"), (b"MM\0+", "BigTIFF in big-endian order")):
        assert str(decode_image(start + bytes(99), WHOLE)).startswith(f"{name}: not supported; convert")
    assert decode_image(b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), WHOLE) == "not an image"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_the_same_above_and_below_the_edge_of_a_strip(mode: str) -> None:
    alpha = noise(600, 20).convert("L")
    image = noise(600, 20).convert("RGB")
    image.putalpha(alpha)
    image = image.convert("RGB").convert("P") if mode == "P" else image.convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes(range(256))
    layer = image.convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    assert np.array_equal(np.asarray(images._convert(image, "RGB")), np.asarray(whole))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_shown_on_white(mode: str) -> None:
    if mode == "P":
        image = Image.fromarray(np.zeros((16, 16), np.uint8))
        data = encode(image.convert("P"), "PNG", transparency=0)
    else:
        data = encode(Image.new(mode, (16, 16), (0,) * len(mode)), "PNG")
    assert (decoded(data) == 255).all()


def test_half_transparency_is_half_white() -> None:
    assert np.abs(decoded(encode(Image.new("RGBA", (16, 16), (0, 0, 0, 128)), "PNG")).astype(int) - 127).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:4, :10] = 255  # an L-shape's arm: no symmetry
    inverse = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(inverse(upright))), "PNG", exif=exif)
    assert np.array_equal(decoded(data), upright)


def test_damaged_exif_does_not_cost_the_image() -> None:
    assert decoded(encode(two_halves(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).shape == (16, 16, 3)


def test_a_large_jpeg_that_is_decoded_smaller_is_still_turned_upright() -> None:
    upright = np.zeros((800, 800, 3), np.uint8)
    upright[:200, :500] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(np.ascontiguousarray(np.rot90(upright))), "JPEG", exif=exif, quality=95)
    assert np.abs(decoded(data).astype(int) - decoded(encode(Image.fromarray(upright), "PNG"))).max() <= 12


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_the_transparent_part_of_a_first_frame_is_white(kind: str) -> None:
    first = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    first.paste((0, 0, 0, 0), (4, 0, 12, 16))
    data = encode(first, kind, save_all=True, append_images=[Image.new("RGBA", (16, 16), "blue")])
    pixels = decoded(data).astype(int)
    assert np.abs(pixels[:, :3] - np.array([255, 0, 0])).max() < 12
    assert (pixels[:, 5:11] >= 250).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decoded(data).astype(int) - np.array([255, 0, 0])).max() < 12


def test_the_short_side_is_scaled_and_the_central_square_cut_out() -> None:
    values = np.zeros((20, 60, 3), np.uint8)
    values[:, 20:40] = 255
    assert (decoded(encode(Image.fromarray(values), "PNG"), Preprocessing(10, 10))[:, 1:-1] == 255).all()
    assert (decoded(encode(Image.fromarray(values.swapaxes(0, 1)), "PNG"), Preprocessing(10, 10))[1:-1] == 255).all()


def test_squashing_keeps_the_whole_picture() -> None:
    values = np.zeros((20, 60, 3), np.uint8)
    values[:, 30:] = 255
    pixels = decoded(encode(Image.fromarray(values), "PNG"), Preprocessing(10, 10, squash=True))
    assert (pixels[:, :4] == 0).all()
    assert (pixels[:, 6:] == 255).all()


def test_an_extreme_aspect_ratio_still_gives_a_square() -> None:
    decoded(encode(noise(1, 2000), "PNG"), Preprocessing(32, 36))
    decoded(encode(noise(2000, 1), "PNG"), Preprocessing(32, 36))


def test_a_line_of_millions_of_pixels_does_not_fill_the_memory() -> None:
    for shape in ((3_000_000, 1), (1, 3_000_000)):
        values = np.zeros(shape, np.uint8)
        values[shape[0] // 2 :, shape[1] // 2 :] = 255
        pixels = decoded(encode(Image.fromarray(values), "PNG"), Preprocessing(224, 256))
        assert pixels.mean() == pytest.approx(127.5, abs=2.0)


def test_the_smaller_decoding_of_a_large_jpeg_looks_the_same() -> None:
    ramp = np.linspace(0, 255, 1600).astype(np.uint8)
    picture = Image.fromarray(np.stack([np.broadcast_to(ramp, (1200, 1600))] * 3, axis=-1))
    jpeg, png = decoded(encode(picture, "JPEG", quality=95)), decoded(encode(picture, "PNG"))
    assert np.abs(jpeg.astype(int) - png).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_jpeg_is_never_decoded_whole(
    kind: str, mode: str, progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    original = images._turn_upright
    monkeypatch.setattr(images, "_turn_upright", lambda image: loaded.append(image.size) or original(image))
    image = noise(1200, 1600).convert(mode)
    several = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
    data = encode(image, kind, progressive=progressive, **several)
    decoded(data, Preprocessing(100, 100))
    assert loaded == [(400, 300)]


def jpeg_noise() -> bytes:
    return encode(noise(300, 500).resize((1500, 900)), "JPEG")


@pytest.mark.parametrize("data", [jpeg_noise(), encode(noise(), "PNG"), encode(noise().convert("P"), "GIF")])
def test_several_views_are_each_what_a_decoding_of_its_own_gives(data: bytes) -> None:
    views = (
        Preprocessing(32, 36),
        Preprocessing(32, 32, "bicubic"),
        Preprocessing(16, 16, squash=True, grayscale=True),
        Preprocessing(224, 256),
    )
    several = SeveralViews(views)
    packed = decode_image(data, several)
    assert isinstance(packed, np.ndarray)
    assert packed.shape == several.shape == (32 * 32 * 3 * 2 + 16 * 16 + 224 * 224 * 3,)
    for view, picture in zip(views, several.split(packed[None]), strict=True):
        assert np.array_equal(picture[0], decoded(data, view))


def test_several_views_of_one_scale_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    original = images._turn_upright
    monkeypatch.setattr(images, "_turn_upright", lambda image: loaded.append(image.size) or original(image))
    views = (Preprocessing(100, 100), Preprocessing(96, 110, "bicubic"), Preprocessing(100, 100, grayscale=True))
    decode_image(jpeg_noise(), SeveralViews(views))
    assert len(loaded) == 1
    assert decode_image(b"no", SeveralViews(views)) == "not an image"
    assert decode_image(jpeg_noise(), SeveralViews(views), max_pixels=10) == "over the limit of 10 pixels"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_a_cut_off_file_is_called_truncated(kind: str, share: float) -> None:
    data = encode(noise(), kind)
    assert decode_image(data[: int(share * len(data))], WHOLE) == "truncated"


def test_what_is_no_image_gets_its_reason() -> None:
    assert decode_image(b"", WHOLE) == "zero bytes"
    assert decode_image(b"hello, this is text", WHOLE) == "not an image"
    assert decode_image(bytes(1000), WHOLE) == "not an image"
    png = encode(noise(), "PNG")
    assert decode_image(png[:20] + bytes(50) + png[70:], WHOLE) == "unreadable: damaged header"


def test_an_image_with_too_many_pixels_is_not_decoded() -> None:
    data = encode(noise(100, 100), "PNG")
    assert decode_image(data, WHOLE, max_pixels=9_999) == "over the limit of 9999 pixels"
    assert isinstance(decode_image(data, WHOLE, max_pixels=10_000), np.ndarray)


def test_a_decompression_bomb_is_recognised_by_its_header() -> None:
    bomb = encode(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    assert decode_image(bomb, WHOLE) == "decompression bomb"


def test_whatever_the_bytes_decoding_never_raises() -> None:
    rng = np.random.default_rng(1)
    originals = [encode(noise(), kind) for kind in FORMATS]
    for _ in range(300):
        data = bytearray(originals[rng.integers(len(originals))])
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] = rng.integers(256)
        result = decode_image(bytes(data[: rng.integers(1, len(data))]), WHOLE, max_pixels=1_000_000)
        assert isinstance(result, (np.ndarray, str))
        assert len(result) > 0


def test_a_file_that_is_gone_or_cannot_be_read_gives_a_reason(tmp_path: Path) -> None:
    assert read_image(str(tmp_path / "gone.png")) == "missing"
    assert read_image((tmp_path / "gone.png").as_uri()) == "missing"
    reason = read_image(str(tmp_path))
    assert isinstance(reason, str)
    assert reason.startswith("unreadable: IsADirectoryError")
    (tmp_path / "a b%20.png").write_bytes(b"x")
    assert read_image(str(tmp_path / "a b%20.png")) == b"x"
    assert read_image((tmp_path / "a b%20.png").as_uri()) == b"x"


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_grey_images_of_more_than_8_bits_are_known_by_their_header(kind: str) -> None:
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 200)
    assert is_deep_grey(encode(deep, kind))
    assert not is_deep_grey(encode(noise().convert("L"), kind))
    assert not is_deep_grey(encode(noise(), kind))
    assert not is_deep_grey(b"P5 nonsense")
