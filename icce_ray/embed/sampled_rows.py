"""The rows of a part that may be drawn for training, in a small file beside the part.

The images with the smallest hashes are drawn, so each part can tell nearly which of its rows that will be. A sample of
a large collection is copied from these files, ``part-00003.sample``, and the parts are not read again. No manifest
lists them: a file names the checksum of its part, and where it is missing, or lacks a row, the part is read.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from icce_ray.embed.part_hashes import sampled_name
from icce_ray.random_numbers import id_hashes
from icce_ray.store import Artifact, Folder, Part

MARGIN = 1.1
"""More rows than are wanted, since images may fail, in place of which others are drawn."""
MAX_SHARE = 0.5
"""If more of the images may be drawn, the parts are read."""
PART_KEY = b"icce_ray.part"
ROW = "row"


@dataclass(frozen=True)
class Draw:
    """Which images may be drawn: those with a hash up to `limit`."""

    seed: int
    limit: int

    @classmethod
    def of(cls, num_images: int, max_images: int | None, seed: int) -> Draw | None:
        """For a sample of `max_images` (None: all) of `num_images`; None if it is too large a share."""
        if max_images is None:
            return None
        share = (max_images + 6 * max_images**0.5) * MARGIN / max(1, num_images)
        return cls(seed, int(share * 2**64)) if share <= MAX_SHARE else None

    def write(self, folder: Folder, part: Part, table: pa.Table) -> None:
        """Write the rows of `part`, whose content is `table`."""
        rows = np.flatnonzero(id_hashes(table["image_id"].to_numpy(), self.seed) <= np.uint64(self.limit))
        drawn = table.take(pa.array(rows)).append_column(ROW, pa.array(rows))
        sink = io.BytesIO()
        metadata = (table.schema.metadata or {}) | {PART_KEY: part.sha256.encode()}
        pq.write_table(drawn.replace_schema_metadata(metadata), sink, compression="zstd", write_page_checksum=True)
        folder.write_bytes(sampled_name(part.name), sink.getbuffer())


def read_rows(artifact: Artifact, name: str, rows: npt.NDArray[np.int64]) -> pa.Table:
    """Some rows of a part, given by number, ascending.

    Raises:
        DamagedArtifactError: the part is needed, and is missing or damaged.
    """
    part = artifact.part(name)
    try:
        data = artifact.folder_of(part).read_bytes(sampled_name(name))
        drawn = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        metadata, numbers = dict(drawn.schema.metadata), drawn[ROW].to_numpy()
    except (OSError, ValueError, KeyError, TypeError):  # Arrow's errors are ValueErrors
        metadata, numbers = {}, rows[:0]
    if metadata.pop(PART_KEY, b"") != part.sha256.encode() or not np.isin(rows, numbers).all():
        return artifact.read_table(name).take(pa.array(rows))
    drawn = drawn.take(pa.array(np.searchsorted(numbers, rows))).drop_columns(ROW)
    return drawn.replace_schema_metadata(metadata)
