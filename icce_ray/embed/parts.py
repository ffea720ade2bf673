"""One part of the embedding artifact: consecutive images, from their URIs to the bytes of a Parquet file.

A part is its own record: its Parquet metadata says which images it covers and which of them failed, why. So one atomic
write finishes it, a resumed run reads it back, and doing it again gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from icce_ray.embed.features import column_name, joined_columns
from icce_ray.embed.images import Pixels, Preprocessing, SeveralViews, decode_image, read_image
from icce_ray.embed.networks import Backbone
from icce_ray.errors import WorkerError
from icce_ray.store import Folder, Part

MAX_DECODED_PART_BYTES = 128 * 2**20
"""Of a part's pixels, which travel through shared memory as one piece."""
READY_MADE_PART_BYTES = 64 * 2**20
READY_MADE_PART_ROWS = 65536
RECORD_KEY = b"icce_ray.part"
ERRORS_SCHEMA = pa.schema([("image_id", pa.int64()), ("uri", pa.string()), ("reason", pa.string())])

Error = tuple[int, str]
"""image_id, reason."""


@dataclass(frozen=True)
class PartRange:
    """The images ``start <= image_id < stop``."""

    index: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"part-{self.index:05d}.parquet"


@dataclass(frozen=True)
class DecodedPart:
    """A part's images, as far as they could be read."""

    image_ids: npt.NDArray[np.int64]
    """(n,), ascending."""
    pixels: Pixels
    """(n, H, W, C) uint8, with several views (n, P)."""
    hashes: list[str]
    """SHA-256 of each file, hex."""
    errors: list[Error]


@dataclass(frozen=True)
class PartRecord:
    """What a finished part says of itself."""

    part: Part
    num_images: int
    """Images that the part covers, good and bad."""
    errors: list[Error]


def decoded_to_table(part: PartRange, decoded: DecodedPart) -> pa.Table:
    """One row that holds a decoded part; the pixels are not copied."""
    offsets = np.array([0, decoded.pixels.nbytes], dtype=np.int64)
    pixels = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(decoded.pixels))]
    )
    columns = {
        "index": [part.index],
        "start": [part.start],
        "stop": [part.stop],
        "image_ids": pa.array([decoded.image_ids.tolist()], pa.list_(pa.int64())),
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
    decoded = DecodedPart(np.array(row["image_ids"], dtype=np.int64), pixels, row["hashes"], errors)
    return PartRange(row["index"], row["start"], row["stop"]), decoded


def plan_parts(num_images: int, images_per_part: int) -> list[PartRange]:
    """Cut ``0..num_images-1`` into parts."""
    starts = range(0, num_images, images_per_part)
    return [PartRange(index, start, min(start + images_per_part, num_images)) for index, start in enumerate(starts)]


def images_per_part(preprocessing: Preprocessing | SeveralViews, wanted: int) -> int:
    """`wanted`, or as many as MAX_DECODED_PART_BYTES holds."""
    return max(1, min(wanted, MAX_DECODED_PART_BYTES // math.prod(preprocessing.shape)))


def ready_made_rows_per_part(dim: int, itemsize: int) -> int:
    """Rows of a part of ready-made embeddings."""
    return max(1, min(READY_MADE_PART_ROWS, READY_MADE_PART_BYTES // (dim * itemsize)))


def decode_part(
    part: PartRange, uris: list[str], preprocessing: Preprocessing | SeveralViews, *, max_pixels: int
) -> DecodedPart:
    """Read and decode a part's images; `uris[i]` is that of image ``part.start + i``. What fails is an error."""
    assert len(uris) == part.stop - part.start
    image_ids: list[int] = []
    hashes: list[str] = []
    errors: list[Error] = []
    pixels = np.empty((len(uris), *preprocessing.shape), dtype=np.uint8)
    for image_id, uri in enumerate(uris, start=part.start):
        data = read_image(uri)
        decoded = data if isinstance(data, str) else decode_image(data, preprocessing, max_pixels=max_pixels)
        if isinstance(decoded, str):
            errors.append((image_id, decoded))
            continue
        assert isinstance(data, bytes)
        pixels[len(image_ids)] = decoded
        image_ids.append(image_id)
        hashes.append(hashlib.sha256(data).hexdigest())
    return DecodedPart(np.array(image_ids, dtype=np.int64), pixels[: len(image_ids)], hashes, errors)


def embed_part(part: PartRange, decoded: DecodedPart, backbone: Backbone, batch_size: int) -> pa.Table:
    """Embed a decoded part. Images whose features are no float16 numbers become errors: what is kept is finite."""
    embeddings = np.empty((len(decoded.image_ids), backbone.dim), dtype=np.float16)
    for start in range(0, len(embeddings), batch_size):
        embeddings[start : start + batch_size] = backbone.embed(decoded.pixels[start : start + batch_size])
    good = np.isfinite(embeddings).all(axis=1)
    errors = list(decoded.errors)
    for row in np.flatnonzero(~good):
        reason = "feature not a number" if np.isnan(embeddings[row]).any() else "feature overflow"
        errors.append((int(decoded.image_ids[row]), reason))
    hashes = pa.array(decoded.hashes, pa.string()).filter(pa.array(good))
    return part_table(part, decoded.image_ids[good], embeddings[good], hashes, sorted(errors), backbone.dims)


def part_table(
    part: PartRange,
    image_ids: npt.NDArray[np.int64],
    embeddings: npt.NDArray[Any],
    hashes: pa.Array | None = None,
    errors: list[Error] | None = None,
    dims: tuple[int, ...] = (),
) -> pa.Table:
    """The part as a table, record included.

    Args:
        part: which images it covers.
        image_ids: (n,) int64, of the good ones.
        embeddings: (n, D) float16 or float32.
        hashes: (n,) string; None where there are no image files.
        errors: the images that are missing here.
        dims: where D is several feature sets side by side, D of each: they get a column each.
    """
    columns = {"image_id": pa.array(image_ids)}
    for index, rows in enumerate(np.split(embeddings, np.cumsum(dims)[:-1], axis=1)):
        values = pa.array(np.ascontiguousarray(rows).reshape(-1))
        columns[column_name(index)] = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    columns["content_hash"] = hashes if hashes is not None else pa.nulls(len(image_ids), pa.string())
    table = pa.table(columns)
    record = {"start": part.start, "stop": part.stop, "errors": errors or []}
    record["sha256"] = _content_digest(table, record)
    return table.replace_schema_metadata({RECORD_KEY: json.dumps(record).encode()})


def write_part(folder: Folder, part: PartRange, table: pa.Table) -> PartRecord:
    """Write the part, atomically."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    folder.write_bytes(part.name, sink.getbuffer())
    record = _parse(part, sink.getvalue())
    assert record is not None
    return record


def read_record(folder: Folder, part: PartRange) -> PartRecord | None:
    """The record of a part that an earlier run finished; None where there is none, or it is damaged, or another's."""
    try:
        data = folder.read_bytes(part.name)
        table = pq.read_table(pa.BufferReader(data))
        record = json.loads(table.schema.metadata[RECORD_KEY])
        if record.pop("sha256") != _content_digest(table, record):
            return None
        return _parse(part, data)
    except Exception:  # whatever a damaged file makes the reader raise: the part is made again
        return None


def begin_try(folder: Folder, part: PartRange, run_id: str, max_tries: int) -> None:
    """Note on storage that a worker of the run starts on the part; :func:`end_tries` takes the note away.

    Raises:
        WorkerError: `max_tries` workers of this run have started on it, and none came to its end.
    """
    name = f".{part.name}.tries"
    try:
        noted, tries = json.loads(folder.read_bytes(name))
    except (FileNotFoundError, ValueError):
        noted, tries = run_id, 0
    tries = tries + 1 if noted == run_id else 1
    if tries > max_tries:
        raise WorkerError(
            f"embed: images {part.start} to {part.stop - 1} killed their worker {max_tries} times. Give it more memory "
            "(a smaller embed.batch_size, fewer workers), or leave these images out; what is finished stays"
        )
    folder.write_bytes(name, json.dumps([run_id, tries]).encode())


def end_tries(folder: Folder, part: PartRange) -> None:
    """Take away what :func:`begin_try` noted."""
    folder.remove(f".{part.name}.tries")


def errors_table(errors: list[Error], uris: pa.ChunkedArray) -> pa.Table:
    """image_id, uri, reason, in ascending image_id; `uris[image_id]` is the image's."""
    ordered = sorted(errors)
    image_ids = pa.array([image_id for image_id, _ in ordered], pa.int64())
    reasons = pa.array([reason for _, reason in ordered], pa.string())
    return pa.table([image_ids, uris.take(image_ids), reasons], names=ERRORS_SCHEMA.names).cast(ERRORS_SCHEMA)


def _content_digest(table: pa.Table, record: dict[str, Any]) -> str:
    """Of all that a part says, apart from how Parquet puts it."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    digest.update(table["image_id"].to_numpy().tobytes())
    digest.update(joined_columns(table).tobytes())
    digest.update("\0".join(value or "" for value in table["content_hash"].to_pylist()).encode())
    return digest.hexdigest()


def _parse(part: PartRange, data: bytes) -> PartRecord | None:
    file = pq.ParquetFile(pa.BufferReader(data))
    record = json.loads(file.schema_arrow.metadata[RECORD_KEY])
    if (record["start"], record["stop"]) != (part.start, part.stop):
        return None
    kind = file.schema_arrow.field("embedding").type
    rows = file.metadata.num_rows
    dtype = str(np.dtype(kind.value_type.to_pandas_dtype()))
    return PartRecord(
        part=Part(
            name=part.name,
            num_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            rows=rows,
            dtype=dtype,
            shape=(rows, kind.list_size),
        ),
        num_images=part.stop - part.start,
        errors=[(int(image_id), str(reason)) for image_id, reason in record["errors"]],
    )
