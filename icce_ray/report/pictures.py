"""Thumbnails of the images on the page, joined to sheets, and the contact sheet with a row of exemplars per cluster.

A sheet is one JPEG with the thumbnails of many images, so that a page with thousands of them has few files. Images are
decoded in processes of their own: one that kills its decoder costs only its picture.
"""

import io
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from icce_ray.images.containers import locate
from icce_ray.images.decoding_process import DecodingProcess
from icce_ray.images.image_formats import IMAGE_ENDINGS
from icce_ray.images.preprocessing import Preprocessing
from icce_ray.images.read_images import read_image
from icce_ray.runtime.machine import usable_cpus

Pixels = npt.NDArray[np.uint8]

THUMBNAIL_PIXELS = 128
SHEET_COLUMNS, SHEET_CELLS = 8, 64
JPEG_QUALITY = 78
MAX_IMAGE_PIXELS = 100_000_000
MAX_PARALLEL_PIXELS = 10_000_000
"""Larger images are decoded one at a time: 100 million pixels take up to 700 MB."""
MAX_PROCESSES = 4
IMAGES_PER_PROCESS = 256
"""For fewer images, another process is not worth its start."""
MAX_SHEET_ROWS = 50
MARGIN_PIXELS = 4
CAPTION_PIXELS = 150
SQUARE = Preprocessing(size=THUMBNAIL_PIXELS, scale_size=THUMBNAIL_PIXELS)


def load_thumbnails(uris: Sequence[str]) -> Iterator[list[Pixels | None]]:
    """The central square of each image, as a backbone sees it, SHEET_CELLS images at a time: (THUMBNAIL_PIXELS,
    THUMBNAIL_PIXELS, 3) uint8.

    None for URIs that don't name an image file (rows of ready-made embeddings) or can no longer be read.
    """
    num_processes = min(usable_cpus(), MAX_PROCESSES, -(-len(uris) // IMAGES_PER_PROCESS))
    idle: queue.SimpleQueue[DecodingProcess] = queue.SimpleQueue()
    large = threading.Lock()

    def load(uri: str) -> Pixels | None:
        if not may_be_image(uri):
            return None
        data = read_image(uri)
        if isinstance(data, str):
            return None
        process = idle.get()
        try:
            picture = process.decode(data, SQUARE, max_pixels=MAX_PARALLEL_PIXELS)
            if isinstance(picture, str) and picture.startswith("over the limit"):
                with large:
                    picture = process.decode(data, SQUARE, max_pixels=MAX_IMAGE_PIXELS)
        finally:
            idle.put(process)
        return None if isinstance(picture, str) else picture

    with ExitStack() as stack:
        for _ in range(num_processes):
            idle.put(stack.enter_context(closing(DecodingProcess())))
        threads = stack.enter_context(ThreadPoolExecutor(2 * num_processes))  # some read while others decode
        for start in range(0, len(uris), SHEET_CELLS):
            yield list(threads.map(load, uris[start : start + SHEET_CELLS]))


def may_be_image(uri: str) -> bool:
    """Whether the URI names an image file, or a place in a container of images."""
    return PurePosixPath(uri).suffix.lower() in IMAGE_ENDINGS or locate(uri) is not None


def sheet(pictures: Sequence[Pixels | None]) -> bytes | None:
    """A JPEG with the pictures in rows of SHEET_COLUMNS, in order; None if there are none."""
    if all(picture is None for picture in pictures):
        return None
    num_rows = -(-len(pictures) // SHEET_COLUMNS)
    pixels = np.full((num_rows * THUMBNAIL_PIXELS, SHEET_COLUMNS * THUMBNAIL_PIXELS, 3), 128, dtype=np.uint8)
    for cell, picture in enumerate(pictures):
        if picture is not None:
            top, left = (THUMBNAIL_PIXELS * place for place in divmod(cell, SHEET_COLUMNS))
            pixels[top : top + THUMBNAIL_PIXELS, left : left + THUMBNAIL_PIXELS] = picture
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return sink.getvalue()


def contact_sheet(rows: list[tuple[str, list[Pixels]]]) -> bytes | None:
    """A PNG with a caption and pictures in each row, at most MAX_SHEET_ROWS rows; None if there are no pictures."""
    shown = [(caption, pictures) for caption, pictures in rows if pictures][:MAX_SHEET_ROWS]
    if not shown:
        return None
    cell = THUMBNAIL_PIXELS + MARGIN_PIXELS
    width = CAPTION_PIXELS + cell * max(len(pictures) for _, pictures in shown) + MARGIN_PIXELS
    image = Image.new("RGB", (width, cell * len(shown) + MARGIN_PIXELS), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(18)
    for row, (caption, pictures) in enumerate(shown):
        top = MARGIN_PIXELS + row * cell
        draw.multiline_text((10, top + THUMBNAIL_PIXELS // 2), caption, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            image.paste(Image.fromarray(picture), (CAPTION_PIXELS + column * cell, top))
    sink = io.BytesIO()
    image.save(sink, format="PNG", optimize=True)
    return sink.getvalue()
