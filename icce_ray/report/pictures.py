"""Thumbnails for the page, and the contact sheet with a row of exemplars per cluster."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from icce_ray.images.containers import locate
from icce_ray.images.decoding import Preprocessing, decode_image
from icce_ray.images.image_files import IMAGE_ENDINGS
from icce_ray.images.read_images import read_image

Pixels = npt.NDArray[np.uint8]

THUMBNAIL_PIXELS = 96
JPEG_QUALITY = 78
MAX_IMAGE_PIXELS = 100_000_000
MAX_PARALLEL_PIXELS = 10_000_000
"""Larger images are decoded one at a time: 100 million pixels take up to 700 MB."""
NUM_THREADS = 8
MAX_SHEET_ROWS = 50
MARGIN_PIXELS = 4
CAPTION_PIXELS = 120


def load_thumbnails(uris: Iterable[str], on_done: Callable[[int, int], None] | None = None) -> dict[str, Pixels]:
    """The central square of each image, as a backbone sees it: (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS, 3) uint8 by URI.

    URIs that don't name an image file (rows of ready-made embeddings), or can no longer be read, are left out.

    Args:
        on_done: called with (done, total) after each image.
    """
    wanted = sorted({uri for uri in uris if PurePosixPath(uri).suffix.lower() in IMAGE_ENDINGS or locate(uri)})
    pictures: dict[str, Pixels] = {}
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for done, (uri, picture) in enumerate(zip(wanted, threads.map(_load, wanted), strict=True), start=1):
            if picture is not None:
                pictures[uri] = picture
            if on_done is not None:
                on_done(done, len(wanted))
    return pictures


def data_uri(picture: Pixels) -> str:
    """The picture as a `data:` URI, which needs no file."""
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()


def contact_sheet(rows: list[tuple[str, list[Pixels]]]) -> bytes | None:
    """A PNG with a caption and pictures in each row, at most MAX_SHEET_ROWS rows; None if there are no pictures."""
    shown = [(caption, pictures) for caption, pictures in rows if pictures][:MAX_SHEET_ROWS]
    if not shown:
        return None
    cell = THUMBNAIL_PIXELS + MARGIN_PIXELS
    width = CAPTION_PIXELS + cell * max(len(pictures) for _, pictures in shown) + MARGIN_PIXELS
    sheet = Image.new("RGB", (width, cell * len(shown) + MARGIN_PIXELS), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for row, (caption, pictures) in enumerate(shown):
        top = MARGIN_PIXELS + row * cell
        draw.multiline_text((10, top + THUMBNAIL_PIXELS // 2), caption, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (CAPTION_PIXELS + column * cell, top))
    sink = io.BytesIO()
    sheet.save(sink, format="PNG", optimize=True)
    return sink.getvalue()


def _load(uri: str) -> Pixels | None:
    data = read_image(uri)
    if isinstance(data, str):
        return None
    preprocessing = Preprocessing(size=THUMBNAIL_PIXELS, scale_size=THUMBNAIL_PIXELS)
    picture = decode_image(data, preprocessing, max_pixels=MAX_PARALLEL_PIXELS)
    if isinstance(picture, str) and picture.startswith("over the limit"):
        with _large:
            picture = decode_image(data, preprocessing, max_pixels=MAX_IMAGE_PIXELS)
    return None if isinstance(picture, str) else picture


_large = threading.Lock()
