"""JPEGs decoded and scaled on the device of the backbone: `embed.decoder: nvjpeg`. On a GPU torchvision calls nvJPEG.
Pillow decodes whatever is no plain JPEG.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from icce_ray.images.decoding import MAX_ASPECT, Pixels, Preprocessing, SeveralViews, decode_image

MAX_PIXELS, MAX_FILE_BYTES = 2**25, 2**20
"""Larger files would fill Ray's object store, and Pillow decodes them at a smaller scale."""
FILES_TOGETHER = 16
"""Decoded at a time: at most 1.6 GB on the device."""


def is_plain_jpeg(data: bytes, preprocessing: Preprocessing | SeveralViews, max_pixels: int) -> bool:
    """Whether the device decodes this file: a complete JPEG in RGB or grey, upright, not too large or long, that is
    scaled in one of the ways that torch knows."""
    is_whole = data.startswith(b"\xff\xd8\xff") and data.rstrip(b"\0").endswith(b"\xff\xd9")
    is_known = all(not view.grayscale and view.interpolation in ("bilinear", "bicubic") for view in preprocessing.views)
    if not is_whole or not is_known or len(data) > MAX_FILE_BYTES:
        return False
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            is_small = image.width * image.height <= min(max_pixels, MAX_PIXELS)
            is_short = max(image.size) <= MAX_ASPECT * min(image.size)
            return image.mode in ("RGB", "L") and is_upright and is_small and is_short
    except Exception:  # Pillow says what is wrong when it decodes the file
        return False


def decode_on_device(
    files: Sequence[bytes], preprocessing: Preprocessing | SeveralViews, device: str
) -> list[Pixels | str]:
    """As :func:`decode_image` of each file. Pillow decodes a file that the device refuses."""
    if len(files) <= FILES_TOGETHER:
        try:
            return _decode(files, preprocessing.views, device) if files else []
        except RuntimeError:  # it does not say which
            if len(files) == 1:
                return [decode_image(files[0], preprocessing)]
    half = min(len(files) // 2, FILES_TOGETHER)
    return decode_on_device(files[:half], preprocessing, device) + decode_on_device(files[half:], preprocessing, device)


def _decode(files: Sequence[bytes], views: Sequence[Preprocessing], device: str) -> list[Pixels | str]:
    import torch
    from torchvision import io as torch_io
    from torchvision.transforms.v2 import InterpolationMode, functional

    encoded: Any = [torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for data in files]
    pictures = torch_io.decode_jpeg(encoded, torch_io.ImageReadMode.RGB, device)
    pixels = []
    for view in views:
        size, filter_ = [view.scale_size] * (2 if view.squash else 1), InterpolationMode(view.interpolation)
        scaled = [functional.resize(picture, size, filter_, antialias=True) for picture in pictures]
        squares = torch.stack([functional.center_crop(picture, [view.size]) for picture in scaled])
        pixels.append(squares.permute(0, 2, 3, 1).cpu().numpy())
    return list(pixels[0] if len(pixels) == 1 else np.concatenate([p.reshape(len(p), -1) for p in pixels], axis=1))
