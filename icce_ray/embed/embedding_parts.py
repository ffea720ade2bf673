"""One part of the embedding artifact: which images it covers, and its Parquet file.

A part is its own record: its Parquet metadata says which images it covers, as listed, and which of them failed, why. So
one atomic write finishes it, a resumed run reads it back, and doing it again gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from icce_ray.embed.feature_matrix import column_name, joined_columns
from icce_ray.errors import DamagedArtifactError
from icce_ray.images.decoding import Preprocessing, SeveralViews
from icce_ray.store import Folder, Part

MIN_IMAGES_PER_PART = 16
MAX_IMAGES_PER_PART = 512
"""What is lost at most when a worker dies."""
PARTS_WANTED = 16
"""Small collections are cut into about this many parts, so that several workers can share them."""
MAX_DECODED_PART_BYTES = 128 * 2**20
"""Limit for a part's pixels, which travel through shared memory together."""
READY_MADE_PART_BYTES = 64 * 2**20
READY_MADE_PART_ROWS = 65536
RECORD_KEY = b"icce_ray.part"
ERRORS_SCHEMA = pa.schema([("image_id", pa.int64()), ("uri", pa.string()), ("reason", pa.string())])
PART_NAME = re.compile(r"part-(x\d{10}|\d{5})(\.r\d+)?\.parquet")

Error = tuple[int, str]
"""image_id, reason."""


@dataclass(frozen=True)
class PartRange:
    """The images ``start <= image_id < stop``."""

    index: int
    start: int
    stop: int
    source: str = ""
    """Digest of their rows in the listing; empty where there is none."""
    revision: int = 0
    """Above 0: the part amends `previous`, by trying the images in `only` again."""
    previous: str = ""
    only: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        # Names sort as the parts do, beyond five digits too.
        number = f"{self.index:05d}" if self.index < 100_000 else f"x{self.index:010d}"
        return f"part-{number}.parquet" if self.revision == 0 else f"part-{number}.r{self.revision}.parquet"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PartRange:
        values = json.loads(text)
        return cls(**{**values, "only": tuple(values["only"])})


@dataclass(frozen=True)
class PartRecord:
    """What a finished part says of itself."""

    part: Part
    num_images: int
    """Images that the part covers, good and bad."""
    errors: list[Error]
    image_ids: list[int] = field(default_factory=list)
    """The good ones."""
    hashes: list[str | None] = field(default_factory=list)
    """Their contents."""
    num_embedded: int = 0
    """Contents that went through the backbone for it in this run."""


def plan_parts(num_images: int, images_per_part: int) -> list[PartRange]:
    """Cut ``0..num_images-1`` into parts."""
    starts = range(0, num_images, images_per_part)
    return [PartRange(index, start, min(start + images_per_part, num_images)) for index, start in enumerate(starts)]


def with_source(part: PartRange, images: pa.Table) -> PartRange:
    """`part` with the digest of its rows in the listing: parts made from other files are then never taken for it."""
    columns = [images[name].combine_chunks() for name in ("uri", "size_bytes", "etag")]
    digest = hashlib.sha256()
    for column in columns:
        digest.update("\0".join("" if value is None else str(value) for value in column.to_pylist()).encode() + b"\n")
    return replace(part, source=digest.hexdigest()[:32])


def images_per_part(num_images: int, preprocessing: Preprocessing | SeveralViews) -> int:
    """The size of the parts of a collection: a power of two, so that a collection that grows by a little keeps its
    parts, unless their pixels would take more than MAX_DECODED_PART_BYTES."""
    wanted = 1 << (num_images // PARTS_WANTED).bit_length()
    fitting = MAX_DECODED_PART_BYTES // math.prod(preprocessing.shape)
    return max(1, min(max(MIN_IMAGES_PER_PART, wanted), MAX_IMAGES_PER_PART, fitting))


def ready_made_rows_per_part(dim: int, itemsize: int) -> int:
    """Rows of a part of ready-made embeddings."""
    return max(1, min(READY_MADE_PART_ROWS, READY_MADE_PART_BYTES // (dim * itemsize)))


def part_table(
    part: PartRange,
    image_ids: npt.NDArray[np.int64],
    embeddings: npt.NDArray[Any],
    hashes: pa.Array | None = None,
    errors: list[Error] | None = None,
    dims: tuple[int, ...] = (),
    *,
    model: str = "",
) -> pa.Table:
    """The part as a table, record included.

    Args:
        part: which images it covers.
        image_ids: (n,) int64, of the good ones.
        embeddings: (n, D) float16 or float32.
        hashes: (n,) string; None where there are no image files.
        errors: the images that are missing here.
        dims: where D is several feature sets side by side, D of each: they get a column each.
        model: key of the model.
    """
    columns = {"image_id": pa.array(image_ids)}
    for index, rows in enumerate(np.split(embeddings, np.cumsum(dims)[:-1], axis=1)):
        values = pa.array(np.ascontiguousarray(rows).reshape(-1))
        columns[column_name(index)] = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    columns["content_hash"] = hashes if hashes is not None else pa.nulls(len(image_ids), pa.string())
    table = pa.table(columns)
    record = {"start": part.start, "stop": part.stop, "source": part.source, "model": model, "errors": errors or []}
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
        return _parse(part, folder.read_bytes(part.name))
    except Exception:  # whatever a damaged file makes the reader raise: the part is made again
        return None


def copy_part(source: Folder, folder: Folder, part: PartRange) -> PartRecord | None:
    """Take over a part that another artifact of the same model made from the same files; None where it has none."""
    try:
        data = source.read_bytes(part.name)
        record = _parse(part, data)
    except Exception:  # as in read_record
        return None
    if record is not None:
        folder.write_bytes(part.name, data)
    return record


def is_part_name(name: str) -> bool:
    return PART_NAME.fullmatch(name) is not None


def read_part(folder: Folder, name: str) -> pa.Table:
    """A part as it was written.

    Raises:
        DamagedArtifactError: it is missing or damaged.
    """
    try:
        return _read_checked(folder.read_bytes(name))[0]
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise DamagedArtifactError(f"{folder.file_uri(name)}: missing or damaged: {error}") from None


def read_hashes(folder: Folder, name: str) -> list[str]:
    """The contents of a part; none where it cannot be read."""
    try:
        column = pq.read_table(pa.BufferReader(folder.read_bytes(name)), columns=["content_hash"])["content_hash"]
    except Exception:  # as in read_record
        return []
    return [value for value in column.to_pylist() if value is not None]


def read_model(folder: Folder, name: str) -> str | None:
    """The key of the model that made a part, or None where it cannot be read."""
    try:
        schema = pq.read_schema(pa.BufferReader(folder.read_bytes(name)))
        model: str = json.loads(schema.metadata[RECORD_KEY])["model"]
        return model
    except Exception:  # as in read_record
        return None


def errors_table(errors: list[Error], uri_of: Callable[[int], str]) -> pa.Table:
    """Failed images: image_id, uri, reason; ascending by id."""
    rows = [(image_id, uri_of(image_id), reason) for image_id, reason in sorted(errors)]
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, ERRORS_SCHEMA.types, strict=True)]
    return pa.table(arrays, schema=ERRORS_SCHEMA)


def _content_digest(table: pa.Table, record: dict[str, Any]) -> str:
    """Of all that a part says, apart from how Parquet puts it."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    digest.update(table["image_id"].to_numpy().tobytes())
    digest.update(joined_columns(table).tobytes())
    digest.update("\0".join(value or "" for value in table["content_hash"].to_pylist()).encode())
    return digest.hexdigest()


def _read_checked(data: bytes) -> tuple[pa.Table, dict[str, Any]]:
    table = pq.read_table(pa.BufferReader(data))
    record = json.loads(table.schema.metadata[RECORD_KEY])
    if record.pop("sha256") != _content_digest(table, record):
        raise ValueError("its bytes are not those that were written")
    return table, record


def _parse(part: PartRange, data: bytes) -> PartRecord | None:
    table, record = _read_checked(data)
    if (record["start"], record["stop"], record["source"]) != (part.start, part.stop, part.source):
        return None
    kind = table.schema.field("embedding").type
    return PartRecord(
        part=Part(
            name=part.name,
            num_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            rows=len(table),
            dtype=str(np.dtype(kind.value_type.to_pandas_dtype())),
            shape=(len(table), kind.list_size),
        ),
        num_images=part.stop - part.start,
        errors=[(int(image_id), str(reason)) for image_id, reason in record["errors"]],
        image_ids=table["image_id"].to_pylist(),
        hashes=table["content_hash"].to_pylist(),
    )
