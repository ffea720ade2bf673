"""The hashes of a part's contents, in a small file beside the part: the content index starts without reading parts.

``part-00003.hashes`` holds the SHA-256 of the model's key, the SHA-256 of each row's content, and the SHA-256 of all
that. No manifest lists it: one that is missing or damaged is made again from its part.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.store import Folder

HASH_BYTES = 32
Hashes = npt.NDArray[np.uint8]
"""(n, HASH_BYTES)."""


@dataclass(frozen=True)
class PartHashes:
    """The model that made a part, and the contents of its rows."""

    model: bytes
    """SHA-256 of the model's key."""
    hashes_nB: Hashes


def hashes_name(part_file: str) -> str:
    """Name of the file of hashes that belongs to a part file."""
    return part_file.removesuffix(".parquet") + ".hashes"


def sampled_name(part_file: str) -> str:
    """Name of the file of rows that may be drawn for training (:mod:`icce_ray.embed.sampled_rows`)."""
    return part_file.removesuffix(".parquet") + ".sample"


def names_beside(part_file: str) -> tuple[str, str]:
    """Names of the files beside a part file, which go with it."""
    return hashes_name(part_file), sampled_name(part_file)


def num_hashes(file_bytes: int) -> int:
    """Number of hashes in a file of that size."""
    return max(0, file_bytes // HASH_BYTES - 2)


def to_bytes(hashes: list[str]) -> Hashes:
    """Hexadecimal hashes -> (n, HASH_BYTES)."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, HASH_BYTES)


def of_column(model: str, hashes: pa.ChunkedArray) -> PartHashes:
    """The hashes in a part's column ``content_hash``."""
    return PartHashes(hashlib.sha256(model.encode()).digest(), to_bytes(hashes.to_pylist()))


def write_hashes(folder: Folder, part_file: str, found: PartHashes) -> None:
    content = found.model + found.hashes_nB.tobytes()
    folder.write_bytes(hashes_name(part_file), content + hashlib.sha256(content).digest())


def read_hashes_file(folder: Folder, part_file: str) -> PartHashes | None:
    """The hashes of a part; None if their file is missing or damaged."""
    try:
        data = folder.read_bytes(hashes_name(part_file))
    except FileNotFoundError:
        return None
    content, digest = data[:-HASH_BYTES], data[-HASH_BYTES:]
    if len(content) < HASH_BYTES or hashlib.sha256(content).digest() != digest:
        return None
    hashes_nB = np.frombuffer(content, np.uint8, offset=HASH_BYTES).reshape(-1, HASH_BYTES)
    return PartHashes(content[:HASH_BYTES], hashes_nB)
