"""Decode image files to pixels of a given size, or say why a file cannot be used.

Every mode that Pillow opens becomes 8-bit RGB or grey: EXIF rotation applied, transparency on white, the first frame of
an animation. A file that cannot be used costs only itself: it yields a short, stable reason for the errors table.
Several backbones that want different sizes share one decoding.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from icce_ray.errors import one_line
from icce_ray.images.image_formats import FORMATS, unsupported_format
from icce_ray.images.preprocessing import Pixels, Preprocessing, SeveralViews

ENDINGS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82", b"GIF8": b";"}
"""The last bytes of a complete file, by its first bytes."""
TIFF_REMEDY = "TIFF: pixels of this type are not supported; convert to 8 or 16 bits, or to 32-bit float"
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0")
DEEP_SIGNATURES = (*TIFF_SIGNATURES, b"P", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51")
"""The first bytes of formats besides PNG that may hold grey images of more than 8 bits: TIFF, PPM, JPEG 2000."""
DRAFT_FACTOR = 2
"""JPEGs are decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 that is still this many times the wanted size."""

MAX_ASPECT = 16
"""Longest side over shortest. Only the middle of a longer strip is scaled: a whole line of a million pixels would need
an enormous image."""

STRIP_ROWS = 256
"""Rows converted at a time, so that intermediate results take little memory."""
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def decode_image(
    data: bytes, preprocessing: Preprocessing | SeveralViews, *, max_pixels: int = 100_000_000
) -> Pixels | str:
    """Decode, orient, convert and scale one image file of at most `max_pixels` (width x height).

    Returns (H, W, C) uint8, or (P,) for several views; or the reason: ``zero bytes``, ``truncated``, ``not an image``,
    ``decompression bomb`` (more than twice Pillow's own limit of 89 million pixels), ``over the limit of N pixels``,
    ``unreadable: ...``. It never raises.
    """
    if not data:
        return "zero bytes"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pictures = _decode_views(data, preprocessing.views, max_pixels)
            except ValueError:  # Pillow limits the metadata of a PNG, not only its pixels
                if (bare := _without_png_text(data)) is None:
                    raise
                pictures = _decode_views(bare, preprocessing.views, max_pixels)
    except Image.DecompressionBombError:
        return "decompression bomb"
    except UnidentifiedImageError:
        return _why_unidentified(data)
    except Exception as error:  # whatever a decoder raises must cost this image alone
        return "truncated" if _is_cut_off(data, error) else f"unreadable: {one_line(error)}"
    if isinstance(pictures, str):
        return pictures
    return pictures[0] if len(pictures) == 1 else np.concatenate([picture.ravel() for picture in pictures])


def is_deep_grey(data: bytes) -> bool:
    """Whether this is a grey image of more than 8 bits, see :func:`_to_8_bits`."""
    if data.startswith(b"\x89PNG"):
        return data[24:26] == b"\x10\x00"  # depth 16, colour type grey
    if not data.startswith(DEEP_SIGNATURES):
        return False
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            return image.mode.startswith(("I", "F"))
    except Exception:  # it becomes an error when it is decoded
        return False


def convert_image(image: Image.Image, preprocessing: Preprocessing, *, max_pixels: int = 100_000_000) -> Pixels | str:
    """Like :func:`decode_image`, for an image that Pillow has opened. The image is not changed."""
    if image.format not in (None, "MPO", *FORMATS):
        return f"{image.format}: not supported"
    if image.width * image.height > max_pixels:
        return f"over the limit of {max_pixels} pixels"
    try:
        return _to_pixels(_turn_upright(image.copy()), preprocessing)
    except Exception as error:
        return f"unreadable: {one_line(error)}"


def _decode_views(data: bytes, views: tuple[Preprocessing, ...], max_pixels: int) -> list[Pixels] | str:
    """The pixels of each view, the same as alone. Views that want the same JPEG scale share one decoding."""
    upright: dict[tuple[int, int], Image.Image] = {}
    pictures = []
    for view in views:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            if image.width * image.height > max_pixels:
                return f"over the limit of {max_pixels} pixels"
            if image.format in ("JPEG", "MPO"):  # MPO: several JPEGs in one file, as some cameras write
                image.draft(None, (DRAFT_FACTOR * view.scale_size, DRAFT_FACTOR * view.scale_size))
            drafted = image.size
            if drafted not in upright:
                image.load()
                upright[drafted] = _turn_upright(image)
        pictures.append(_to_pixels(upright[drafted], view))
    return pictures


def _to_pixels(upright: Image.Image, view: Preprocessing) -> Pixels:
    upright, size = _convert(upright, "L" if view.grayscale else "RGB"), view.scale_size
    width, height = upright.size
    length = MAX_ASPECT * min(width, height)
    if max(width, height) > length and not view.squash:
        left, top = max(0, (width - length) // 2), max(0, (height - length) // 2)
        upright = upright.crop((left, top, min(width, left + length), min(height, top + length)))
        width, height = upright.size
    short = min(width, height)
    target = (size, size) if view.squash else (int(size * width / short), int(size * height / short))
    if target != upright.size:
        upright = upright.resize(target, Image.Resampling[view.interpolation.upper()])
    left, top = round((target[0] - view.size) / 2), round((target[1] - view.size) / 2)
    square = upright.crop((left, top, left + view.size, top + view.size))
    return np.asarray(square).reshape(view.shape)


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data; the image itself may be fine
        upright = image
    if not image.mode.startswith(("I", "F")) or not isinstance(image, TiffImagePlugin.TiffImageFile):
        return upright
    # Pillow takes 32 bits without a sign for numbers with one, and the least number for black where it means white.
    is_unsigned, is_white = image.mode == "I" and image.tag_v2.get(339, (1,))[0] == 1, image.tag_v2.get(262) == 0
    values = np.asarray(upright).view(np.uint32) if is_unsigned else np.asarray(upright)
    if is_white:
        values = -values.astype(np.float64)
    return Image.fromarray(values.astype(np.float32)) if is_unsigned or is_white else upright


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert to `mode` (RGB or L), 8 bits, transparency on white."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        on_white = Image.new("RGB", image.size)
        for top in range(0, image.height, STRIP_ROWS):
            layer = image.crop((0, top, image.width, min(image.height, top + STRIP_ROWS))).convert("RGBA")
            white = Image.new("RGBA", layer.size, "white")
            on_white.paste(Image.alpha_composite(white, layer).convert("RGB"), (0, top))
        image = on_white
    if image.mode == mode:
        return image
    # Some versions of Pillow refuse some conversions to grey, such as from CMYK. All work by way of RGB.
    return image.convert(mode) if image.mode in ("L", "RGB", "1") else image.convert("RGB").convert(mode)


def _to_8_bits(values: npt.NDArray[Any]) -> Pixels:
    """Grey values of a 16-bit, 32-bit or float image, whose type does not tell the range: the minimum becomes 0, the
    maximum 255. A value that is not finite counts as the nearest finite one, a NaN as the minimum."""
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    scale = 255.0 / (high - low) if high > low else 0.0
    result = np.empty(values.shape, dtype=np.uint8)
    for top in range(0, len(values), STRIP_ROWS):
        strip = np.nan_to_num(values[top : top + STRIP_ROWS].astype(np.float64), nan=low, posinf=high, neginf=low)
        result[top : top + STRIP_ROWS] = np.rint((strip - low) * scale)
    return result


def _without_png_text(data: bytes) -> bytes | None:
    """A PNG without its texts and colour profile, or None if there are none."""
    if not data.startswith(b"\x89PNG"):
        return None
    kept, position = [data[:8]], 8
    while position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] not in PNG_TEXT:
            kept.append(data[position:end])
        position = end
    bare = b"".join(kept)
    return bare if len(bare) < len(data) else None


def _why_unidentified(data: bytes) -> str:
    if (reason := unsupported_format(data)) is not None:
        return reason
    for signature, ending in ENDINGS.items():
        if data.startswith(signature):
            return "unreadable: damaged header" if data.rstrip(b"\0").endswith(ending) else "truncated"
    if data.startswith(TIFF_SIGNATURES):
        try:
            with warnings.catch_warnings(action="ignore"):
                TiffImagePlugin.TiffImageFile(io.BytesIO(data))
        except Exception as error:
            return TIFF_REMEDY if "unknown" in str(error) else "truncated"
    is_cut_off = data.startswith(b"BM") or (data.startswith(b"RIFF") and data[8:12] in (b"WEBP", b""))
    return "truncated" if is_cut_off else "not an image"


def _is_cut_off(data: bytes, error: Exception) -> bool:
    if data.startswith(b"RIFF"):
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    text = str(error).lower()
    return isinstance(error, EOFError) or any(word in text for word in ("truncated", "unexpected end", "not enough"))
