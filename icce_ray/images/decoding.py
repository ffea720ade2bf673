"""Decode image files to pixels of a given size, or say why a file cannot be used.

Every mode that Pillow opens becomes 8-bit RGB or grey: EXIF rotation applied, transparency on white, the first frame of
an animation. A file that cannot be used costs only itself: it yields a short, stable reason for the errors table.
Several backbones that want different sizes share one decoding.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

ENDINGS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82", b"GIF8": b";"}
"""The last bytes of a complete file, by its first bytes."""
OTHER_SIGNATURES = (b"RIFF", b"BM", b"II*\0", b"MM\0*")
DRAFT_FORMATS = ("JPEG", "MPO")
"""MPO: several JPEGs in one file, as some cameras write."""
DRAFT_FACTOR = 2
"""JPEGs are decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 that is still this many times the wanted size."""

MAX_ASPECT = 16
"""Longest side over shortest. Only the middle of a longer strip is scaled: a whole line of a million pixels would need
an enormous image."""

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Preprocessing:
    """How a backbone wants its images: the short side scaled to `scale_size`, then cropped to the central square."""

    size: int
    """Side of the square result in pixels."""
    scale_size: int
    """Short side in pixels before the crop."""
    interpolation: Interpolation = "bilinear"
    """Pillow's filter, with antialiasing."""
    squash: bool = False
    """Scale both sides to `scale_size` instead, ignoring the aspect ratio."""
    grayscale: bool = False
    """One channel (luma) instead of three."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size, self.size, 1 if self.grayscale else 3

    @property
    def views(self) -> tuple[Preprocessing, ...]:
        return (self,)


@dataclass(frozen=True)
class SeveralViews:
    """Several views of each image, for backbones with different preprocessing; their pixels are concatenated (P)."""

    views: tuple[Preprocessing, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(math.prod(view.shape) for view in self.views),)

    def split(self, pixels_BP: Pixels) -> list[Pixels]:
        """(B, P) -> (B, H, W, C) of each view."""
        ends = np.cumsum([math.prod(view.shape) for view in self.views])
        flat = np.split(pixels_BP, ends[:-1], axis=1)
        return [pixels.reshape(-1, *view.shape) for pixels, view in zip(flat, self.views, strict=True)]


def common_preprocessing(views: Sequence[Preprocessing]) -> Preprocessing | SeveralViews:
    """A preprocessing that serves all of `views`: each different one once."""
    different = tuple(dict.fromkeys(views))
    return different[0] if len(different) == 1 else SeveralViews(different)


def decode_image(
    data: bytes, preprocessing: Preprocessing | SeveralViews, *, max_pixels: int = 100_000_000
) -> Pixels | str:
    """Decode, orient, convert and scale one image file.

    Usage::

        pixels = decode_image(data, Preprocessing(size=224, scale_size=256))
        if isinstance(pixels, str): ...   # the reason

    Args:
        data: the file's bytes.
        preprocessing: the wanted size and colours.
        max_pixels: images with more pixels (width x height) are not decoded.

    Returns:
        (H, W, C) uint8, or (P,) for several views; or the reason: ``zero bytes``, ``truncated``, ``not an image``,
        ``decompression bomb`` (more than twice Pillow's own limit of 89 million pixels), ``over the limit of N
        pixels``, ``unreadable: ...``. It never raises.
    """
    if not data:
        return "zero bytes"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pictures = _decode_views(data, preprocessing.views, max_pixels)
    except Image.DecompressionBombError:
        return "decompression bomb"
    except UnidentifiedImageError:
        return _why_unidentified(data)
    except Exception as error:  # whatever a decoder raises must cost this image alone
        return "truncated" if _is_cut_off(data, error) else f"unreadable: {_one_line(error)}"
    if isinstance(pictures, str):
        return pictures
    return pictures[0] if len(pictures) == 1 else np.concatenate([picture.ravel() for picture in pictures])


def convert_image(image: Image.Image, preprocessing: Preprocessing, *, max_pixels: int = 100_000_000) -> Pixels | str:
    """Like :func:`decode_image`, for an image that Pillow has opened. The image is not changed."""
    if image.width * image.height > max_pixels:
        return f"over the limit of {max_pixels} pixels"
    try:
        upright = _turn_upright(image.copy())
        return _to_pixels(_convert(upright, "L" if preprocessing.grayscale else "RGB"), preprocessing)
    except Exception as error:
        return f"unreadable: {_one_line(error)}"


def _decode_views(data: bytes, views: tuple[Preprocessing, ...], max_pixels: int) -> list[Pixels] | str:
    """The pixels of each view, the same as alone. Views that want the same JPEG scale share one decoding."""
    upright: dict[tuple[int, int], Image.Image] = {}
    pictures = []
    for view in views:
        with Image.open(io.BytesIO(data)) as image:  # reads the header only
            if image.width * image.height > max_pixels:
                return f"over the limit of {max_pixels} pixels"
            if image.format in DRAFT_FORMATS:
                image.draft(None, (DRAFT_FACTOR * view.scale_size, DRAFT_FACTOR * view.scale_size))
            drafted = image.size
            if drafted not in upright:
                image.load()
                upright[drafted] = _turn_upright(image)
        pictures.append(_to_pixels(_convert(upright[drafted], "L" if view.grayscale else "RGB"), view))
    return pictures


def _to_pixels(upright: Image.Image, view: Preprocessing) -> Pixels:
    size = view.scale_size
    width, height = upright.size
    if max(width, height) > MAX_ASPECT * min(width, height) and not view.squash:
        length = MAX_ASPECT * min(width, height)
        left, top = max(0, (width - length) // 2), max(0, (height - length) // 2)
        upright = upright.crop((left, top, min(width, left + length), min(height, top + length)))
        width, height = upright.size
    if view.squash:
        target = (size, size)
    elif width <= height:
        target = (size, max(size, int(size * height / width)))
    else:
        target = (max(size, int(size * width / height)), size)
    if target != upright.size:
        upright = upright.resize(target, Image.Resampling[view.interpolation.upper()])
    left, top = round((target[0] - view.size) / 2), round((target[1] - view.size) / 2)
    square = upright.crop((left, top, left + view.size, top + view.size))
    return np.asarray(square, dtype=np.uint8).reshape(view.shape)


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data; the image itself may be fine
        return image


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert to `mode` (RGB or L), 8 bits, transparency on white."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bits(np.asarray(image), is_16_bit=image.mode.startswith("I")))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer).convert("RGB")
    if image.mode == mode:
        return image
    # Some versions of Pillow refuse some conversions to grey, such as from CMYK. All work by way of RGB.
    return image.convert(mode) if image.mode in ("L", "RGB", "1") else image.convert("RGB").convert(mode)


def _to_8_bits(values: npt.NDArray[Any], *, is_16_bit: bool) -> Pixels:
    """Grey values of a 16-bit, 32-bit or float image as 0..255.

    Integers up to 65,535 count as 16-bit. Floats within 0..1 are scaled by 255; within 0..255 they are kept. Any other
    range is stretched from its minimum to its maximum.
    """
    finite = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(finite.min()), float(finite.max())
    if low >= 0.0 and is_16_bit and high <= 65535.0:
        scaled = finite / 257.0
    elif low >= 0.0 and not is_16_bit and high <= 255.0:
        scaled = finite * (255.0 if high <= 1.0 else 1.0)
    else:
        scaled = (finite - low) * (255.0 / max(high - low, 1e-300))
    return np.rint(scaled).astype(np.uint8)


def _why_unidentified(data: bytes) -> str:
    for signature, ending in ENDINGS.items():
        if data.startswith(signature):
            return "unreadable: damaged header" if data.rstrip(b"\0").endswith(ending) else "truncated"
    return "truncated" if data.startswith(OTHER_SIGNATURES) else "not an image"


def _is_cut_off(data: bytes, error: Exception) -> bool:
    if data.startswith(b"RIFF"):
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    text = str(error).lower()
    return isinstance(error, EOFError) or any(word in text for word in ("truncated", "unexpected end", "not enough"))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
