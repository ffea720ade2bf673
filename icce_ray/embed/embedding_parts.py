"""The parts of the embedding artifact: which images each covers, and its Parquet file.

A part holds image_id, embedding (one column for each feature set) and content_hash of the images that could be used.
Its record (:mod:`icce_ray.store.part_records`) says which images failed. A part written again has the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from icce_ray.embed.feature_matrix import COLUMN, Draw, column_name
from icce_ray.embed.part_hashes import HASH_BYTES, PartHashes, read_hashes_file, to_bytes, write_hashes
from icce_ray.errors import DamagedArtifactError
from icce_ray.images.preprocessing import Preprocessing, SeveralViews
from icce_ray.store import Artifact, ArtifactWriter, Folder, PartRecord, PartRecords

MIN_IMAGES_PER_ITEM = 16
MAX_IMAGES_PER_ITEM = 512
"""Largest number of images that are lost when a worker dies."""
ITEMS_WANTED = 16
"""Small collections are cut into about this many work items, so that several workers can share them."""
MAX_DECODED_ITEM_BYTES = 128 * 2**20
"""Limit for an item's pixels, which travel through shared memory together."""
PARTS_WANTED = 128
"""Larger collections have about this many parts until these have MAX_PART_ROWS or MAX_PART_BYTES."""
MAX_PART_BYTES = 64 * 2**20
MAX_PART_ROWS = 65536
PART, ITEM = "part", "item"
ERRORS_NAME = "errors.parquet"
MODEL_KEY = b"icce_ray.model"
PART_NAME = re.compile(r"(?:part|item)-(x\d{10}|\d{5})(?:\.r(?P<revision>\d+))?\.parquet")

Error = tuple[int, str]
"""image_id, reason."""


@dataclass(frozen=True)
class PartRange:
    """The images ``start <= image_id < stop``: a part, or a work item (:mod:`icce_ray.embed.work_items`)."""

    index: int
    start: int
    stop: int
    revision: int = 0
    """Above 0: the part amends an earlier one by trying images again that failed."""
    only: tuple[int, ...] = ()
    """If not empty, the item is about these images alone."""
    kind: str = PART

    @property
    def name(self) -> str:
        # Names sort in the order of the parts, beyond five digits too.
        number = f"{self.index:05d}" if self.index < 100_000 else f"x{self.index:010d}"
        return f"{self.kind}-{number}" if self.revision == 0 else f"{self.kind}-{number}.r{self.revision}"

    @property
    def file_name(self) -> str:
        return f"{self.name}.parquet"

    @property
    def num_images(self) -> int:
        return self.stop - self.start

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PartRange:
        values = json.loads(text)
        return cls(**{**values, "only": tuple(values["only"])})


def images_per_item(num_images: int, preprocessing: Preprocessing | SeveralViews) -> int:
    """The size of a collection's work items: a power of two, so that a collection that grows by a little keeps its
    parts, unless their pixels would take more than MAX_DECODED_ITEM_BYTES."""
    wanted = 1 << (num_images // ITEMS_WANTED).bit_length()
    fitting = MAX_DECODED_ITEM_BYTES // math.prod(preprocessing.shape)
    return max(1, min(max(MIN_IMAGES_PER_ITEM, wanted), MAX_IMAGES_PER_ITEM, fitting))


def items_per_part(num_images: int, images_per_item: int, dim: int) -> int:
    """Number of work items that are joined to a part: a power of two; 1 in collections below some 130,000 images.
    `dim` is D of all feature sets together."""
    most = min(rows_per_part(dim, np.dtype(np.float16).itemsize), num_images // PARTS_WANTED) // images_per_item
    return 1 << max(0, most.bit_length() - 1)


def rows_per_part(dim: int, itemsize: int) -> int:
    """The largest number of rows of a part."""
    return max(1, min(MAX_PART_ROWS, MAX_PART_BYTES // (dim * itemsize)))


def plan_parts(num_images: int, images_per_part: int) -> list[PartRange]:
    """Cut the images ``0..num_images-1`` into parts."""
    starts = range(0, num_images, images_per_part)
    return [PartRange(index, start, min(start + images_per_part, num_images)) for index, start in enumerate(starts)]


def source_digest(images: Artifact, model: str = "") -> str:
    """Digest of what determines the parts: the listing, and the model with this key."""
    return hashlib.sha256(f"{model}\0{images.checksum()}".encode()).hexdigest()[:32]


def part_table(
    image_ids: npt.NDArray[np.int64],
    embeddings_nD: npt.NDArray[Any],
    hashes: pa.Array | None = None,
    dims: tuple[int, ...] = (),
    *,
    model: str = "",
) -> pa.Table:
    """The content of a part: the images that could be used, float16 or float32 features, of which each set (`dims`)
    gets its own column, and (n,) hashes if there are image files. The key of the model is kept in the file's
    metadata."""
    columns = {"image_id": pa.array(image_ids)}
    for index, rows in enumerate(np.split(embeddings_nD, np.cumsum(dims)[:-1], axis=1)):
        values = pa.array(np.ascontiguousarray(rows).reshape(-1))
        columns[column_name(index)] = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    columns["content_hash"] = hashes if hashes is not None else pa.nulls(len(image_ids), pa.string())
    return pa.table(columns).replace_schema_metadata({MODEL_KEY: model.encode()})


def write_part(
    records: PartRecords,
    part: PartRange,
    table: pa.Table,
    errors: Iterable[Error] = (),
    draw: Draw | None = None,
    **counts: int,
) -> PartRecord:
    """Write the part, then its record. The rows that `draw` chooses lie beside it. Its metrics are `start`,
    `num_images` (covered, good and bad), `errors`, and the `counts` of its images: `num_embedded` (contents that went
    through the backbone for it), `num_stretched`."""
    sink, kind, num_rows = io.BytesIO(), table.schema.field(COLUMN).type, len(table)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    dtype, shape = str(np.dtype(kind.value_type.to_pandas_dtype())), (num_rows, kind.list_size)
    writer = ArtifactWriter(records.folder)
    file = writer.write_bytes(part.file_name, sink.getbuffer(), rows=num_rows, dtype=dtype, shape=shape)
    if found := _hashes_of(table):
        write_hashes(records.folder, part.file_name, found)
    if draw is not None and part.kind == PART:
        draw.write(records.folder, file, table)
    metrics = {"start": part.start, "num_images": part.num_images, "errors": list(errors), "num_embedded": 0}
    return records.write(part.name, [file], metrics | counts)


def read_part(folder: Folder, name: str, sha256: str | None = None, columns: list[str] | None = None) -> pa.Table:
    """The content of the part file `name`. Raises DamagedArtifactError: it is missing or damaged, or its checksum is
    not `sha256`."""
    try:
        data = folder.read_bytes(name)
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("the bytes are not those that were written")
        table = pq.read_table(pa.BufferReader(data), columns=columns, page_checksum_verification=True)
        return table.select(columns or table.column_names)  # raises if one is missing
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise DamagedArtifactError(f"{folder.file_uri(name)}: missing or damaged: {error}") from None


def read_hashes(
    folder: Folder, name: str, num_bytes: int = HASH_BYTES, num_rows: int | None = None
) -> PartHashes | None:
    """The contents of a part file's rows, as :func:`read_hashes_file`; None if it holds none or cannot be read. If
    their own file is missing or damaged, it is made again from the part."""
    if (found := read_hashes_file(folder, name, num_bytes, num_rows)) is not None:
        return found
    try:
        found = _hashes_of(read_part(folder, name, columns=["content_hash"]))
    except DamagedArtifactError:
        return None
    if found is None:
        return None
    write_hashes(folder, name, found)
    return replace(found, hashes_nB=found.hashes_nB[:, -num_bytes:])


def _hashes_of(table: pa.Table) -> PartHashes | None:
    """Ready-made embeddings have no hashes."""
    model, hashes = hashlib.sha256(table.schema.metadata[MODEL_KEY]).digest(), table["content_hash"]
    return PartHashes(model, to_bytes(hashes.to_pylist())) if hashes.null_count == 0 else None


def revision_of(name: str) -> int:
    """How often the part file `name` was amended."""
    found = PART_NAME.fullmatch(name)
    assert found is not None
    return int(found["revision"] or 0)
