"""The hashes of a part's contents, in a small file beside the part, so that the content index starts without reading
parts; and the hash table of the index.

``part-00003.hashes`` holds the SHA-256 of the model's key and, in two pieces, that of each row's content: the last 8
bytes of all rows, by which the index knows contents, then the first 24. After each piece comes the SHA-256 of the model
and the pieces so far, so the index reads the first piece alone. No manifest lists the file: one that is missing or
damaged is made again from its part.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
    return part_file.removesuffix(".parquet") + ".hashes"


def sampled_name(part_file: str) -> str:
    """Name of the file with the rows that may be drawn for training (:mod:`icce_ray.embed.feature_matrix`)."""
    return part_file.removesuffix(".parquet") + ".sample"


def names_beside(part_file: str) -> tuple[str, str]:
    """The files beside a part file, which go with it."""
    return hashes_name(part_file), sampled_name(part_file)


def num_hashes(file_bytes: int) -> int:
    """Number of hashes in a file of that size."""
    return max(0, file_bytes // HASH_BYTES - 1 - len(PIECES))


def to_bytes(hashes: list[str]) -> Hashes:
    """Hexadecimal hashes -> (n, HASH_BYTES)."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, HASH_BYTES)


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
    """The hashes of a part, of each the last `num_bytes`: KEY_BYTES or HASH_BYTES; None if their file is missing or
    damaged. If the rows of the part are given, only the wanted bytes are read."""
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


MAX_LOAD = 0.5
"""Share of the slots in use. One key in a hundred has to look beyond its bucket then."""
BUCKET = 16
"""Slots that are looked at together."""
GROWTH = 1.5
EMPTY = np.uint32(2**32 - 1)
NO_FILE = np.uint32(2**32 - 2)
"""The key has a slot, but no file."""

Keys = npt.NDArray[np.uint64]
"""(n,) 8 of the 32 bytes of a SHA-256. Among a billion, two are equal with a probability of 3%: who finds a content by
its key has to compare its hash."""
Slots = npt.NDArray[np.int64]


class HashTable:
    """Open addressing in buckets, each of which is filled in order; a key whose bucket is full goes into the next one.
    Keys are never removed: one without a file keeps its slot. With more keys than are expected, the table grows, which
    takes 2.5 times its memory for a moment."""

    files: npt.NDArray[np.uint32]
    """(slots,) number of a file, NO_FILE, or EMPTY: the slot has no key."""
    rows: npt.NDArray[np.uint32]
    """(slots,)."""

    def __init__(self, num_keys: int) -> None:
        self._allocate(num_keys)

    def insert(self, keys: Keys) -> Slots:
        """The slot of each key; new ones get one, with NO_FILE."""
        if self.num_keys + len(keys) > MAX_LOAD * len(self.files):
            used = self.files != EMPTY
            old = self.keys[used], self.files[used], self.rows[used]
            self._allocate(round(GROWTH * (self.num_keys + len(keys))))
            slots = self.find(old[0], insert=True)
            self.files[slots], self.rows[slots] = old[1:]
        return self.find(keys, insert=True)

    def _allocate(self, num_keys: int) -> None:
        num_slots = (int(num_keys / MAX_LOAD) // BUCKET + 64) * BUCKET
        self.num_keys = 0
        self.keys = np.zeros(num_slots, np.uint64)
        self.files = np.full(num_slots, EMPTY)
        self.rows = np.zeros(num_slots, np.uint32)

    def find(self, keys: Keys, *, insert: bool = False) -> Slots:
        """The slot of each key; -1 for those that have none."""
        keys_of_bucket, files_of_bucket = self.keys.reshape(-1, BUCKET), self.files.reshape(-1, BUCKET)
        num_buckets = len(keys_of_bucket)
        buckets = (keys % np.uint64(num_buckets)).astype(np.int64)
        found = np.full(len(keys), -1)
        left = np.arange(len(keys))
        while len(left):
            empty = files_of_bucket.take(buckets, axis=0) == EMPTY
            same = (keys_of_bucket.take(buckets, axis=0) == keys[left, None]) & ~empty
            slots = buckets * BUCKET + same.argmax(axis=1)
            is_here = same.any(axis=1)
            found[left[is_here]] = slots[is_here]
            is_full = ~empty[:, -1]
            is_left = ~is_here if insert else ~is_here & is_full
            new = ~is_here & ~is_full
            if insert and new.any():
                # If several keys want the same slot, the last one gets it; then all look again.
                taken, numbers = buckets[new] * BUCKET + empty[new].argmax(axis=1), np.arange(np.count_nonzero(new))
                self.keys[taken], self.files[taken], self.rows[taken] = keys[left[new]], NO_FILE, numbers
                self.num_keys += int(np.count_nonzero(self.rows[taken] == numbers))
            buckets = np.where(is_full, (buckets + 1) % num_buckets, buckets)[is_left]
            left = left[is_left]
        return found
