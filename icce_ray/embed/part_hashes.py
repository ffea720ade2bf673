"""The hashes of a part's contents, in a small file beside the part: the content index starts without reading parts.

``part-00003.hashes`` holds the SHA-256 of the model's key and, in two pieces, that of each row's content: the last 8
bytes of all rows, by which the index knows contents, then the first 24. After each piece comes the SHA-256 of the model
and the pieces so far, so the index reads the first piece alone. No manifest lists the file: one that is missing or
damaged is made again from its part.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.store import Folder

HASH_BYTES = 32
KEY_BYTES = 8
PIECES = ((0, KEY_BYTES), (KEY_BYTES, HASH_BYTES))
"""Bytes of a hash, counted from its end."""
Hashes = npt.NDArray[np.uint8]
"""(n, HASH_BYTES), or only the last bytes."""


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
    return max(0, file_bytes // HASH_BYTES - 1 - len(PIECES))


def to_bytes(hashes: list[str]) -> Hashes:
    """Hexadecimal hashes -> (n, HASH_BYTES)."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, HASH_BYTES)


def of_column(model: str, hashes: pa.ChunkedArray) -> PartHashes:
    """The hashes in a part's column ``content_hash``."""
    return PartHashes(hashlib.sha256(model.encode()).digest(), to_bytes(hashes.to_pylist()))


def write_hashes(folder: Folder, part_file: str, found: PartHashes) -> None:
    content, digest = bytearray(found.model), hashlib.sha256(found.model)
    for start, stop in PIECES:
        piece = found.hashes_nB[:, HASH_BYTES - stop : HASH_BYTES - start].tobytes()
        digest.update(piece)
        content += piece + digest.digest()
    folder.write_bytes(hashes_name(part_file), bytes(content))


def read_hashes_file(
    folder: Folder, part_file: str, num_bytes: int = HASH_BYTES, num_rows: int | None = None
) -> PartHashes | None:
    """The hashes of a part; None if their file is missing or damaged.

    Args:
        num_bytes: the last bytes that are wanted of each hash: KEY_BYTES or HASH_BYTES.
        num_rows: of the part. If it is given, only the wanted bytes are read.
    """
    pieces = [piece for piece in PIECES if piece[1] <= num_bytes]
    name, digest_bytes = hashes_name(part_file), HASH_BYTES
    try:
        if num_rows is None:
            data = folder.read_bytes(name)
            num_rows = num_hashes(len(data))
        else:
            data = folder.read_start(name, HASH_BYTES + num_rows * num_bytes + len(pieces) * digest_bytes)
    except FileNotFoundError:
        return None
    model, position = data[:HASH_BYTES], HASH_BYTES
    digest, found = hashlib.sha256(model), list[Hashes]()
    for start, stop in pieces:
        end = position + num_rows * (stop - start)
        digest.update(data[position:end])
        if data[end : end + digest_bytes] != digest.digest():
            return None
        found.insert(0, np.frombuffer(data, np.uint8, end - position, position).reshape(num_rows, stop - start))
        position = end + digest_bytes
    return PartHashes(model, np.concatenate(found, axis=1))
