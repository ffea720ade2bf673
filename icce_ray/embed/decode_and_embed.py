"""The work on one part: from the URIs of its images to pixels, and from pixels to embeddings.

With `embed.decoder: nvjpeg`, plain JPEGs are left to the device of the backbone; on a GPU torchvision calls nvJPEG.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import ExifTags, Image

from icce_ray.embed.embedding_parts import Error, PartRange, part_table
from icce_ray.embed.networks import Features
from icce_ray.images.decoding import MAX_ASPECT, decode_image, is_deep_grey
from icce_ray.images.listing import ListedImage
from icce_ray.images.preprocessing import Pixels, Preprocessing, SeveralViews
from icce_ray.images.read_images import read_images
from icce_ray.store.attempts import KILLER, Attempt

MAX_JPEG_PIXELS, MAX_JPEG_BYTES = 2**25, 2**20
"""Larger files would fill Ray's object store, and Pillow decodes them at a smaller scale."""
FILES_TOGETHER = 16
"""Decoded at a time: at most 1.6 GB on the device."""
HASHED_TOGETHER = 64
"""Number of images whose files are held until it is known which of them need decoding."""

Outcome = npt.NDArray[Any] | str
"""An embedding (D,), or why there is none."""


@dataclass(frozen=True)
class DecodedPart:
    """The images of a part that could be read. Each content is decoded once."""

    image_ids: npt.NDArray[np.int64]
    """(n,) ascending."""
    rows: npt.NDArray[np.int32]
    """(n,) rows of `pixels` and, after these, of `jpegs`; -1 if the content has an embedding already and was not
    decoded."""
    pixels: Pixels
    """(m, H, W, C) uint8; with several views (m, P)."""
    hashes: list[str]
    """(n,) SHA-256 of each file, hex."""
    errors: list[Error]
    num_stretched: int = 0
    """Grey images of more than 8 bits among them, whose range is a guess."""
    num_bytes: int = 0
    """Size of the files that were read."""
    jpegs: tuple[bytes, ...] = ()
    """Files that the device of the backbone decodes."""

    def with_jpegs(self, decode: Callable[[Sequence[bytes]], list[Pixels | str]]) -> DecodedPart:
        """The same with all pixels; JPEGs that turn out to be damaged become errors."""
        if not self.jpegs:
            return self
        pictures = [*self.pixels, *decode(self.jpegs)]
        reasons = {row: reason for row, reason in enumerate(pictures) if isinstance(reason, str)}
        good = ~np.isin(self.rows, list(reasons))
        failed = [(int(self.image_ids[place]), reasons[self.rows[place]]) for place in np.flatnonzero(~good)]
        blank = np.zeros(self.pixels.shape[1:], np.uint8)
        return replace(
            self,
            image_ids=self.image_ids[good],
            rows=self.rows[good],
            pixels=np.stack([blank if isinstance(picture, str) else picture for picture in pictures]),
            hashes=[self.hashes[place] for place in np.flatnonzero(good)],
            errors=sorted(self.errors + failed),
            jpegs=(),
        )


NOTHING_DECODED = DecodedPart(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.uint8), [], [])


def decoded_to_table(part: PartRange, decoded: DecodedPart, problem: str = "") -> pa.Table:
    """Pack a decoded part, or a problem that ends the job, into one row; the pixels are not copied."""
    offsets = np.array([0, decoded.pixels.nbytes], dtype=np.int64)
    pixels = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(decoded.pixels))]
    )
    rest = pickle.dumps((part, replace(decoded, pixels=NOTHING_DECODED.pixels), decoded.pixels.shape))
    return pa.table({"rest": pa.array([rest], pa.large_binary()), "problem": [problem], "pixels": pixels})


def decoded_from_table(table: pa.Table) -> tuple[PartRange, DecodedPart]:
    """Unpack the row of :func:`decoded_to_table`. The pixels are a read-only view of the table's memory."""
    part, decoded, shape = pickle.loads(table["rest"][0].as_buffer())
    return part, replace(decoded, pixels=np.frombuffer(table["pixels"][0].as_buffer(), np.uint8).reshape(shape))


def decode_part(
    part: PartRange,
    images: Sequence[ListedImage],
    preprocessing: Preprocessing | SeveralViews,
    *,
    max_pixels: int,
    known: Callable[[list[str]], set[str]] | None = None,
    attempt: Attempt | None = None,
    decode: Callable[..., Pixels | str] = decode_image,
    keep_jpegs: bool = False,
) -> DecodedPart:
    """Read, hash and decode the images of a part, or those in `part.only` alone; those that fail become errors.

    Args:
        images: the part's rows in the listing, in order.
        known: returns those of the given contents that need not be decoded.
        decode: :func:`decode_image`, or the same in another process.
        keep_jpegs: leave JPEGs to the device of the backbone.
    """
    assert len(images) == part.num_images
    attempt = attempt or Attempt()
    only = set(part.only)
    by_id = {image.image_id: image for image in images if not only or image.image_id in only}
    errors: list[Error] = [(image_id, KILLER) for image_id in attempt.blamed() & by_id.keys()]
    good: list[tuple[int, int, str]] = []
    pixels = np.empty((len(by_id), *preprocessing.shape), dtype=np.uint8)
    num_decoded = num_stretched = num_bytes = 0
    outcomes: dict[str, int | str] = {}
    jpegs: list[bytes] = []
    for files in _files(list(by_id.values()), attempt):
        hashes = [hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else "" for _, data in files]
        new = sorted({value for value in hashes if value and value not in outcomes})
        outcomes |= dict.fromkeys(known(new) if known is not None and new else (), -1)
        for (image, data), content in zip(files, hashes, strict=True):
            if isinstance(data, str):
                errors.append((image.image_id, data))
                continue
            num_bytes += len(data)
            num_stretched += is_deep_grey(data)
            if content not in outcomes and keep_jpegs and is_plain_jpeg(data, preprocessing, max_pixels):
                outcomes[content] = len(by_id) + len(jpegs)
                jpegs.append(data)
            if content not in outcomes:
                decoded = decode(data, preprocessing, max_pixels=max_pixels)
                if isinstance(decoded, str):
                    outcomes[content] = decoded
                else:
                    pixels[num_decoded], outcomes[content] = decoded, num_decoded
                    num_decoded += 1
            outcome = outcomes[content]
            if isinstance(outcome, str):
                errors.append((image.image_id, outcome))
            else:
                good.append((image.image_id, outcome, content))
    good.sort()  # files arrive in any order
    rows = np.array([row for _, row, _ in good], dtype=np.int32)
    rows[rows >= len(by_id)] -= len(by_id) - num_decoded
    return DecodedPart(
        image_ids=np.array([image_id for image_id, _, _ in good], dtype=np.int64),
        rows=rows,
        pixels=pixels[:num_decoded],
        hashes=[content for _, _, content in good],
        errors=sorted(errors),
        num_stretched=num_stretched,
        num_bytes=num_bytes,
        jpegs=tuple(jpegs),
    )


def _files(images: Sequence[ListedImage], attempt: Attempt) -> Iterator[list[tuple[ListedImage, bytes | str]]]:
    """The files of the images, some at a time; one by one in a careful attempt, which has to find the image at which
    workers die."""
    if attempt.is_careful:
        by_id = {image.image_id: image for image in images}
        for ids in attempt.steps(list(by_id), 1):
            yield list(read_images([by_id[image_id] for image_id in ids]))
        return
    ahead = read_images(images)
    while files := list(islice(ahead, HASHED_TOGETHER)):
        yield files


def embed_contents(
    decoded: DecodedPart,
    hashes: list[str],
    embed: Callable[[Pixels], Features],
    batch_size: int,
    attempt: Attempt | None = None,
    on_batch: Callable[[int], None] = lambda num_embedded: None,
) -> dict[str, Outcome]:
    """Embed contents of a decoded part: a finite (D,) float16 by hash, or why there is none.

    All batches have the same shape, filled up with repeats, so an image's embedding does not depend on which others are
    embedded beside it, nor on how many there are. `on_batch` is told after each how many images were embedded so far.
    """
    attempt = attempt or Attempt()
    wanted = set(hashes)
    row_of: dict[int, int] = {}
    hash_of: dict[int, str] = {}
    for image_id, row, content in zip(decoded.image_ids.tolist(), decoded.rows.tolist(), decoded.hashes, strict=True):
        if content in wanted:
            wanted.remove(content)
            row_of[image_id], hash_of[image_id] = row, content
    outcomes: dict[str, Outcome] = {hash_of[image_id]: KILLER for image_id in attempt.blamed() & hash_of.keys()}
    for ids in attempt.steps(list(row_of), batch_size):
        rows = [row_of[image_id] for image_id in ids]
        padded = rows + rows[-1:] * (batch_size - len(rows))
        embeddings = embed(decoded.pixels[padded])[: len(rows)]
        for image_id, embedding in zip(ids, embeddings, strict=True):
            outcome: Outcome = embedding
            if not np.isfinite(embedding).all():
                outcome = "feature not a number" if np.isnan(embedding).any() else "feature overflow"
            outcomes[hash_of[image_id]] = outcome
        on_batch(len(outcomes))
    return outcomes


def assemble_part(
    decoded: DecodedPart, outcomes: Mapping[str, Outcome], dims: tuple[int, ...], *, model: str = ""
) -> tuple[pa.Table, list[Error]]:
    """Put the embeddings of a part's contents together: its table, and the images that failed. `outcomes` has all of
    `decoded.hashes`; `dims` are D of each feature set."""
    images = [
        (image_id, value, outcomes[value])
        for image_id, value in zip(decoded.image_ids.tolist(), decoded.hashes, strict=True)
    ]
    failed = [(image_id, outcome) for image_id, _, outcome in images if isinstance(outcome, str)]
    good = [image for image in images if not isinstance(image[2], str)]
    ids = np.array([image_id for image_id, _, _ in good], dtype=np.int64)
    hashes = pa.array([value for _, value, _ in good], pa.string())
    embeddings = np.stack([vector for _, _, vector in good]) if good else np.empty((0, sum(dims)), dtype=np.float16)
    return part_table(ids, embeddings, hashes, dims, model=model), sorted(decoded.errors + failed)


def is_plain_jpeg(data: bytes, preprocessing: Preprocessing | SeveralViews, max_pixels: int) -> bool:
    """Whether the device decodes this file: a complete JPEG in RGB or grey, upright, not too large or long, that is
    scaled in one of the ways that torch knows."""
    is_whole = data.startswith(b"\xff\xd8\xff") and data.rstrip(b"\0").endswith(b"\xff\xd9")
    is_known = all(not view.grayscale and view.interpolation in ("bilinear", "bicubic") for view in preprocessing.views)
    if not is_whole or not is_known or len(data) > MAX_JPEG_BYTES:
        return False
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            is_small = image.width * image.height <= min(max_pixels, MAX_JPEG_PIXELS)
            is_short = max(image.size) <= MAX_ASPECT * min(image.size)
            return image.mode in ("RGB", "L") and is_upright and is_small and is_short
    except Exception:  # Pillow says what is wrong when it decodes the file
        return False


def decode_on_device(
    files: Sequence[bytes], preprocessing: Preprocessing | SeveralViews, device: str
) -> list[Pixels | str]:
    """Decode each file as :func:`decode_image` does. Pillow decodes a file that the device refuses."""
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
