"""The work on one part: from the URIs of its images to their pixels, and from the pixels to embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.embed.embedding_parts import Error, PartRange, part_table
from icce_ray.embed.feature_matrix import joined_columns
from icce_ray.embed.networks import Backbone
from icce_ray.images.decoding import Pixels, Preprocessing, SeveralViews, decode_image
from icce_ray.images.listing import ListedImage
from icce_ray.images.read_images import read_images
from icce_ray.store.attempts import KILLER, Attempt, UnrecordedAttempt

HASHED_TOGETHER = 64
"""Images whose files are held at once, until it is known which of them need to be decoded."""

Outcome = npt.NDArray[Any] | str
"""An embedding (D,), or why there is none."""


@dataclass(frozen=True)
class DecodedPart:
    """A part's images, as far as they could be read. Each content is decoded once."""

    image_ids: npt.NDArray[np.int64]
    """(n,), ascending."""
    rows: npt.NDArray[np.int32]
    """(n,), of `pixels`; -1 where the content has an embedding already and was not decoded."""
    pixels: Pixels
    """(m, H, W, C) uint8, with several views (m, P)."""
    hashes: list[str]
    """(n,), SHA-256 of each file, hex."""
    errors: list[Error]


def decoded_to_table(part: PartRange, decoded: DecodedPart) -> pa.Table:
    """One row that holds a decoded part; the pixels are not copied."""
    offsets = np.array([0, decoded.pixels.nbytes], dtype=np.int64)
    pixels = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(decoded.pixels))]
    )
    columns = {
        "part": [part.to_json()],
        "image_ids": pa.array([decoded.image_ids.tolist()], pa.list_(pa.int64())),
        "rows": pa.array([decoded.rows.tolist()], pa.list_(pa.int32())),
        "hashes": pa.array([decoded.hashes], pa.list_(pa.string())),
        "errors": [json.dumps(decoded.errors)],
        "shape": [list(decoded.pixels.shape)],
        "pixels": pixels,
    }
    return pa.table(columns)


def decoded_from_table(table: pa.Table) -> tuple[PartRange, DecodedPart]:
    """What :func:`decoded_to_table` packed. The pixels are a read-only view of the table's memory."""
    row = table.drop_columns("pixels").to_pylist()[0]
    pixels = np.frombuffer(table["pixels"][0].as_buffer(), dtype=np.uint8).reshape(row["shape"])
    errors = [(image_id, reason) for image_id, reason in json.loads(row["errors"])]
    ids, rows = np.array(row["image_ids"], dtype=np.int64), np.array(row["rows"], dtype=np.int32)
    return PartRange.from_json(row["part"]), DecodedPart(ids, rows, pixels, row["hashes"], errors)


def decode_part(
    part: PartRange,
    images: Sequence[ListedImage],
    preprocessing: Preprocessing | SeveralViews,
    *,
    max_pixels: int,
    known: Callable[[list[str]], set[str]] | None = None,
    tries: Attempt | UnrecordedAttempt | None = None,
) -> DecodedPart:
    """Read, hash and decode a part's images. What fails is an error.

    Args:
        part: which images; only those in `part.only` where that is set.
        images: their rows in the listing, in order.
        preprocessing: the wanted size and colours.
        max_pixels: as in :func:`decode_image`.
        known: which contents need not be decoded.
        tries: notes what a worker is at when it dies.
    """
    assert len(images) == part.stop - part.start
    tries = tries or UnrecordedAttempt()
    only = set(part.only)
    by_id = {image.image_id: image for image in images if not only or image.image_id in only}
    errors: list[Error] = [(image_id, KILLER) for image_id in tries.blamed() & by_id.keys()]
    good: list[tuple[int, int, str]] = []
    pixels = np.empty((len(by_id), *preprocessing.shape), dtype=np.uint8)
    num_decoded = 0
    outcomes: dict[str, int | str] = {}
    for files in _files(list(by_id.values()), tries):
        hashes = [hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else "" for _, data in files]
        new = sorted({value for value in hashes if value and value not in outcomes})
        outcomes |= dict.fromkeys(known(new) if known is not None and new else (), -1)
        for (image, data), content in zip(files, hashes, strict=True):
            if isinstance(data, str):
                errors.append((image.image_id, data))
                continue
            if content not in outcomes:
                decoded = decode_image(data, preprocessing, max_pixels=max_pixels)
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
    good.sort()  # files come in no order
    return DecodedPart(
        image_ids=np.array([image_id for image_id, _, _ in good], dtype=np.int64),
        rows=np.array([row for _, row, _ in good], dtype=np.int32),
        pixels=pixels[:num_decoded],
        hashes=[content for _, _, content in good],
        errors=sorted(errors),
    )


def _files(
    images: Sequence[ListedImage], tries: Attempt | UnrecordedAttempt
) -> Iterator[list[tuple[ListedImage, bytes | str]]]:
    """The files of the images, some at a time; one by one where it must be plain at which a worker dies."""
    if tries.is_careful:
        by_id = {image.image_id: image for image in images}
        for ids in tries.steps(list(by_id), 1):
            yield list(read_images([by_id[image_id] for image_id in ids]))
        return
    ahead = read_images(images)
    while files := list(islice(ahead, HASHED_TOGETHER)):
        yield files


def embed_contents(
    part: PartRange,
    decoded: DecodedPart,
    hashes: list[str],
    backbone: Backbone,
    batch_size: int,
    tries: Attempt | UnrecordedAttempt | None = None,
) -> dict[str, Outcome]:
    """Embed contents of a decoded part: (D,) float16 by hash, or why not. What is kept is finite.

    All batches of a part have one shape, filled up with repeats: an image's embedding then does not depend on which
    others needed to be embedded beside it.
    """
    tries = tries or UnrecordedAttempt()
    wanted = set(hashes)
    row_of: dict[int, int] = {}
    hash_of: dict[int, str] = {}
    for image_id, row, content in zip(decoded.image_ids.tolist(), decoded.rows.tolist(), decoded.hashes, strict=True):
        if content in wanted:
            wanted.remove(content)
            row_of[image_id], hash_of[image_id] = row, content
    outcomes: dict[str, Outcome] = {hash_of[image_id]: KILLER for image_id in tries.blamed() & hash_of.keys()}
    batch_rows = min(batch_size, part.stop - part.start)
    for ids in tries.steps(list(row_of), batch_rows):
        rows = [row_of[image_id] for image_id in ids]
        padded = rows + rows[-1:] * (batch_rows - len(rows))
        embeddings = backbone.embed(decoded.pixels[padded])[: len(rows)]
        for image_id, embedding in zip(ids, embeddings, strict=True):
            outcomes[hash_of[image_id]] = _checked(embedding)
    return outcomes


def _checked(embedding: npt.NDArray[np.float16]) -> Outcome:
    if np.isfinite(embedding).all():
        return embedding
    return "feature not a number" if np.isnan(embedding).any() else "feature overflow"


def assemble_part(
    part: PartRange,
    decoded: DecodedPart,
    outcomes: Mapping[str, Outcome],
    dims: tuple[int, ...],
    *,
    model: str = "",
    previous: pa.Table | None = None,
) -> pa.Table:
    """The part as a table, of the embeddings of its contents.

    Args:
        part: which images it covers.
        decoded: its images.
        outcomes: by content hash, of all of `decoded.hashes`.
        dims: D of each feature set.
        model: key of the model, which the record repeats.
        previous: the part that it amends.
    """
    good = [not isinstance(outcomes[content], str) for content in decoded.hashes]
    vectors = [outcomes[content] for content in decoded.hashes if not isinstance(outcomes[content], str)]
    errors = decoded.errors + [
        (int(image_id), str(outcomes[content]))
        for image_id, content, is_good in zip(decoded.image_ids, decoded.hashes, good, strict=True)
        if not is_good
    ]
    embeddings = np.stack(vectors) if vectors else np.empty((0, sum(dims)), dtype=np.float16)
    ids, hashes = decoded.image_ids[np.array(good, dtype=bool)], pa.array(decoded.hashes, pa.string())
    hashes = hashes.filter(pa.array(good, pa.bool_()))
    if previous is not None:
        old = joined_columns(previous)
        order = np.argsort(np.concatenate([previous["image_id"].to_numpy(), ids]), kind="stable")
        ids = np.concatenate([previous["image_id"].to_numpy(), ids])[order]
        embeddings = np.concatenate([old, embeddings])[order]
        hashes = pa.concat_arrays([previous["content_hash"].combine_chunks(), hashes]).take(pa.array(order))
    return part_table(part, ids, embeddings, hashes, sorted(errors), dims, model=model)
