"""The embedding artifact as one memory-mapped matrix, built once per machine from the Parquet parts, since training
reads rows at random; and some rows of it.

The images with the smallest hashes are drawn for training, so each part can tell nearly which of its rows that will be.
A sample of a large collection is copied from small files beside the parts, ``part-00003.sample``, and the parts are not
read again. No manifest lists them: a file names the checksum of its part, and where it is missing, or lacks a row, the
part is read.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from icce_ray.embed.part_hashes import sampled_name
from icce_ray.errors import DamagedArtifactError
from icce_ray.random_numbers import id_hashes
from icce_ray.store import Artifact, Folder, Part
from icce_ray.store.cache import cache_entry, is_sealed, locked, replacing, seal

PART_PREFIX = "part-"
COLUMN = "embedding"


@dataclass(frozen=True)
class Features:
    """One feature set of all images that were embedded, in ascending ``image_id``."""

    image_ids: npt.NDArray[np.int64]
    """(N,) int64, the image of each row of the matrix. Not 0..N-1 if images failed."""
    matrix: npt.NDArray[Any]
    """(N, D) float16 or float32, a read-only memory map: copy before working in place."""
    name: str
    """Name of the feature set, e.g. ``pixels`` or ``vit_small_patch14_dinov2:cls``."""

    @property
    def num_images(self) -> int:
        return int(self.matrix.shape[0])

    @property
    def dim(self) -> int:
        return int(self.matrix.shape[1])


def feature_set_names(artifact: Artifact) -> list[str]:
    """Names of the feature sets of an ``embed`` artifact, in the order of their numbers; stages use the first unless
    told otherwise."""
    first = artifact.metrics.get("feature_set", COLUMN)
    return [str(name) for name in artifact.metrics.get("feature_sets", [first])]


def load_features(artifact: Artifact, feature_set: int = 0) -> Features:
    """The matrix of a finished ``embed`` artifact. `feature_set` is an index into :func:`feature_set_names`.

    Usage::

        features = load_features(context.inputs["embed"])
        rows_BD = np.array(features.matrix[rows], dtype=np.float32)   # a copy: the map is shared and read-only

    The first call on a machine copies the parts into ``<cache>/embed/<fingerprint>/`` (ICCE_CACHE), one part in memory
    at a time; simultaneous callers wait for it, later ones only map the file. Raises DamagedArtifactError: a part is
    missing, or its bytes or its type are not those that the manifest promises.
    """
    names = artifact.part_names(PART_PREFIX)
    if not names:
        raise DamagedArtifactError(f"{artifact.folder.uri}: the embedding artifact has no parts")
    # The fingerprint identifies what was asked for, the checksums what came out: a stale cache must never be read.
    digest = artifact.checksum(PART_PREFIX)[:12]
    folder = cache_entry(artifact.manifest.stage, artifact.fingerprint)
    suffix = f"-{feature_set}" if feature_set else ""
    paths = matrix_path, ids_path = folder / f"features-{digest}{suffix}.npy", folder / f"image_ids-{digest}.npy"
    if not all(map(is_sealed, paths)):
        with locked(folder / ".features.lock"):
            if not all(map(is_sealed, paths)):
                _build(artifact, names, feature_set, matrix_path, ids_path)
    matrix = np.load(matrix_path, mmap_mode="r", allow_pickle=False)
    image_ids = np.load(ids_path, allow_pickle=False)
    image_ids.flags.writeable = False
    return Features(image_ids, matrix, feature_set_names(artifact)[feature_set])


def table_to_arrays(table: pa.Table, feature_set: int = 0) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """``(image_ids (n,) int64, embeddings (n, D))`` of one Parquet part, read-only if no copy was needed."""
    column = table[column_name(feature_set)].combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=True)
    return table["image_id"].to_numpy(), values.reshape(len(column), column.type.list_size)


def column_name(feature_set: int) -> str:
    """The Parquet column of a feature set: ``embedding``, ``embedding_1``, ``embedding_2``, ..."""
    return COLUMN if feature_set == 0 else f"{COLUMN}_{feature_set}"


def joined_columns(table: pa.Table) -> npt.NDArray[Any]:
    """(n, sum of D): the feature sets of a part side by side, as a backbone returns them."""
    num_sets = sum(name.startswith(COLUMN) for name in table.schema.names)
    sets = [table_to_arrays(table, feature_set)[1] for feature_set in range(num_sets)]
    return sets[0] if num_sets == 1 else np.concatenate(sets, axis=1)


def _build(artifact: Artifact, names: list[str], feature_set: int, matrix_path: Path, ids_path: Path) -> None:
    num_images = int(artifact.num_rows(PART_PREFIX).sum())
    image_ids = np.empty(num_images, dtype=np.int64)
    matrix: npt.NDArray[Any] | None = None
    with replacing(matrix_path) as temporary:
        start = 0
        for name in names:
            ids, rows = table_to_arrays(artifact.read_table(name), feature_set)
            if matrix is None:
                matrix = np.lib.format.open_memmap(
                    temporary, mode="w+", dtype=rows.dtype, shape=(num_images, rows.shape[1])
                )
            stop = start + len(rows)
            if rows.dtype != matrix.dtype or rows.shape[1] != matrix.shape[1] or stop > num_images:
                raise DamagedArtifactError(
                    f"{artifact.folder.file_uri(name)}: holds {rows.shape} {rows.dtype}, which does not fit the "
                    f"{matrix.shape} {matrix.dtype} of the artifact"
                )
            matrix[start:stop], image_ids[start:stop] = rows, ids
            start = stop
        if start != num_images or (np.diff(image_ids) <= 0).any():
            raise DamagedArtifactError(f"{artifact.folder.uri}: the parts do not hold each image once, in order")
        assert isinstance(matrix, np.memmap)
        matrix.flush()
    with replacing(ids_path) as temporary, temporary.open("wb") as file:
        np.save(file, image_ids, allow_pickle=False)
    for path in (matrix_path, ids_path):
        seal(path)


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
    """Some rows of a part, given by number, ascending. Raises DamagedArtifactError: the part is needed, and is missing
    or damaged."""
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
