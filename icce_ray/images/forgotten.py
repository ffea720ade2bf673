"""The images that a user had removed (``icce-ray forget``): hashes of their URIs, kept in the output.

No listing of this output takes them up again, though their files may still be there. Where a listing had them, a
placeholder keeps their ids.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator

import pyarrow as pa

from icce_ray.errors import InputError
from icce_ray.store import Folder

FORGOTTEN_FOLDER, FORGOTTEN_NAME = "forgotten", "uri_hashes"
PREFIX = "forgotten:"
HASH_BYTES = 32

Hashes = frozenset[bytes]


def uri_hash(uri: str) -> bytes:
    return hashlib.sha256(uri.encode()).digest()


def placeholder(digest: bytes) -> str:
    """Stands for the URI of a forgotten image."""
    return PREFIX + digest.hex()


def read_forgotten(output: str) -> Hashes:
    """The hashes of all forgotten URIs. Raises InputError: the file of them is damaged."""
    try:
        data = (Folder.at(output) / FORGOTTEN_FOLDER).read_bytes(FORGOTTEN_NAME)
    except FileNotFoundError:
        return frozenset()
    if len(data) % HASH_BYTES:
        place = (Folder.at(output) / FORGOTTEN_FOLDER).file_uri(FORGOTTEN_NAME)
        raise InputError(f"{place} is damaged, so forgotten images might come back; restore it, or forget them again")
    return frozenset(data[start : start + HASH_BYTES] for start in range(0, len(data), HASH_BYTES))


def add_forgotten(output: str, hashes: Iterable[bytes]) -> None:
    together = sorted(read_forgotten(output) | set(hashes))
    (Folder.at(output) / FORGOTTEN_FOLDER).write_bytes(FORGOTTEN_NAME, b"".join(together))


def without_forgotten(tables: Iterable[pa.Table], output: str, skipped: Counter[str]) -> Iterator[pa.Table]:
    """The entries of a listing without the forgotten images, which are counted."""
    forgotten = read_forgotten(output)
    for table in tables:
        is_kept = [uri_hash(uri) not in forgotten for uri in table["uri"].to_pylist()] if forgotten else [True]
        if not all(is_kept):
            skipped["forgotten"] += is_kept.count(False)
            table = table.filter(is_kept)
        yield table
