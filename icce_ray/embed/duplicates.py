"""Images with the same content, found from the hashes beside the parts, some millions at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from icce_ray.embed.embedding_parts import read_hashes
from icce_ray.embed.part_hashes import HASH_BYTES, Hashes
from icce_ray.errors import DamagedArtifactError
from icce_ray.store import Folder

IMAGES_PER_PASS = 2**25
"""Images whose contents are compared at once, in 1.4 GB of memory. More are divided by hash, and read as often."""
READ_THREADS = 8

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HashedPart:
    """A part file, and the images ``start <= image_id < stop`` in it, without those that failed."""

    folder: Folder
    name: str
    start: int
    stop: int
    failed_ids: Ids

    def __len__(self) -> int:
        return self.stop - self.start - len(self.failed_ids)

    @property
    def image_ids(self) -> Ids:
        """(n,) ascending: the image of each row."""
        return np.delete(np.arange(self.start, self.stop), self.failed_ids - self.start)

    def hashes(self) -> Hashes:
        """Raises DamagedArtifactError: the part is missing or damaged, or holds other images."""
        found = read_hashes(self.folder, self.name)
        if found is None or len(found.hashes_nB) != len(self):
            raise DamagedArtifactError(f"{self.folder.file_uri(self.name)}: does not hold the images that it should")
        return found.hashes_nB


def find_duplicates(parts: Sequence[HashedPart]) -> tuple[Ids, Ids]:
    """The images whose content an earlier image has, ascending, and the first image with that content. Raises
    DamagedArtifactError: as :meth:`HashedPart.hashes`.

    Args:
        parts: by ascending ids.
    """
    num_passes = -(-sum(map(len, parts)) // IMAGES_PER_PASS) or 1
    found = [_duplicates_among(parts, number, num_passes) for number in range(num_passes)]
    image_ids, first_ids = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.argsort(image_ids)
    return image_ids[order], first_ids[order]


def _duplicates_among(parts: Sequence[HashedPart], number: int, num_passes: int) -> tuple[Ids, Ids]:
    """Those among the contents of one pass."""

    def read(part: HashedPart) -> tuple[npt.NDArray[np.uint64], Ids]:
        keys_n2 = part.hashes()[:, HASH_BYTES // 2 :].copy().view(np.uint64)  # enough to tell contents apart
        ours = keys_n2[:, 0] % np.uint64(num_passes) == number
        return keys_n2[ours], part.image_ids[ours]

    with ThreadPoolExecutor(READ_THREADS) as threads:
        pieces = list(threads.map(read, parts))
    keys_n2 = np.concatenate([keys for keys, _ in pieces] or [np.empty((0, 2), np.uint64)])
    image_ids = np.concatenate([ids for _, ids in pieces] or [np.empty(0, np.int64)])
    del pieces
    # Sorting by a part of the key leaves few candidates.
    order = np.argsort(keys_n2[:, 0], kind="stable")
    is_same = keys_n2[order[1:], 0] == keys_n2[order[:-1], 0]
    rows = order[np.append(is_same, False) | np.append(False, is_same)] if len(order) else order
    rows = rows[np.lexsort((image_ids[rows], keys_n2[rows, 1], keys_n2[rows, 0]))]
    is_first = np.ones(len(rows), dtype=np.bool_)
    is_first[1:] = (keys_n2[rows[1:]] != keys_n2[rows[:-1]]).any(axis=1)
    firsts = rows[is_first][np.cumsum(is_first) - 1]
    return image_ids[rows[~is_first]], image_ids[firsts[~is_first]]


def hashes_of(parts: Sequence[HashedPart], image_ids: Ids) -> Iterator[tuple[slice, list[str]]]:
    """The contents of some images, given ascending, part by part: their places among `image_ids`, and the hashes."""
    for part in parts:
        start, stop = np.searchsorted(image_ids, [part.start, part.stop])
        if start < stop:
            rows = np.searchsorted(part.image_ids, image_ids[start:stop])
            yield slice(start, stop), [row.tobytes().hex() for row in part.hashes()[rows]]
