"""Images with the same content, found from the hashes beside the parts.

Each hash is read once. The rows are put into files on the local disk by hash, and what is found by image, so that only
some millions are in memory at a time.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from icce_ray.embed.embedding_parts import read_hashes
from icce_ray.embed.part_hashes import Hashes
from icce_ray.errors import DamagedArtifactError
from icce_ray.store import Folder

IMAGES_TOGETHER = 2**21
"""Images whose contents are compared at once, in some 250 MB of memory."""
READ_THREADS = 8
READ_TOGETHER = 16
"""Parts that are read before their rows are put away."""

Ids = npt.NDArray[np.int64]
Rows = npt.NDArray[np.uint64]


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

    def rows(self) -> Rows:
        """(n, 5): the images, and the words of their hashes. Raises DamagedArtifactError: the part is missing or
        damaged, or holds other images."""
        found = read_hashes(self.folder, self.name)
        if found is None or len(found.hashes_nB) != len(self):
            raise DamagedArtifactError(f"{self.folder.file_uri(self.name)}: does not hold the images that it should")
        image_ids = np.delete(np.arange(self.start, self.stop), self.failed_ids - self.start)
        return np.column_stack([image_ids.astype(np.uint64), np.ascontiguousarray(found.hashes_nB).view(np.uint64)])


@dataclass(frozen=True)
class Duplicates:
    """Images whose content an earlier image has."""

    image_ids: Ids
    """(n,) ascending."""
    first_ids: Ids
    """(n,) the first image with the same content."""
    hashes_nB: Hashes


class _Sorted:
    """Rows in files, by a number from 0 to `num_files`."""

    def __init__(self, folder: Path, num_files: int) -> None:
        folder.mkdir()
        self._paths = [folder / str(number) for number in range(num_files)]

    def add(self, rows_nW: Rows, numbers_n: Ids) -> None:
        order = np.argsort(numbers_n, kind="stable")
        numbers, starts = np.unique(numbers_n[order], return_index=True)
        for number, (start, stop) in zip(numbers, pairwise([*starts, len(order)]), strict=True):
            with self._paths[number].open("ab") as file:
                file.write(rows_nW[order[start:stop]].tobytes())

    def take(self, width: int) -> Iterator[Rows]:
        """The rows of each number, which are removed."""
        for path in self._paths:
            path.touch()
            yield np.fromfile(path, np.uint64).reshape(-1, width)
            path.unlink()


def find_duplicates(parts: Sequence[HashedPart]) -> Iterator[Duplicates]:
    """The images whose content an earlier image has, by ascending id, some at a time. The parts are in the order of
    their ids. Raises DamagedArtifactError: as :meth:`HashedPart.rows`."""
    num_files = -(-sum(map(len, parts)) // IMAGES_TOGETHER) or 1
    ids_per_file = -(-parts[-1].stop // num_files) if parts else 1
    with TemporaryDirectory(prefix="icce_ray-") as place, ThreadPoolExecutor(READ_THREADS) as threads:
        by_hash, by_image = _Sorted(Path(place, "hash"), num_files), _Sorted(Path(place, "image"), num_files)
        for first in range(0, len(parts), READ_TOGETHER):
            for rows_n5 in threads.map(HashedPart.rows, parts[first : first + READ_TOGETHER]):
                by_hash.add(rows_n5, (rows_n5[:, 1] % np.uint64(num_files)).astype(np.int64))
        for rows_n5 in by_hash.take(5):
            found_n6 = _duplicates_among(rows_n5)
            by_image.add(found_n6, found_n6[:, 1].astype(np.int64) // ids_per_file)
        for found_n6 in filter(len, by_image.take(6)):
            found_n6 = found_n6[np.argsort(found_n6[:, 1])]
            first_ids, image_ids = found_n6[:, :2].astype(np.int64).T
            yield Duplicates(image_ids, first_ids, np.ascontiguousarray(found_n6[:, 2:]).view(np.uint8))


def _duplicates_among(rows_n5: Rows) -> Rows:
    """(m, 6): before the rows of images whose content an earlier one has, the first one with that content."""
    # Sorting by a part of the hash leaves few candidates.
    order = np.argsort(rows_n5[:, 1])
    is_same = rows_n5[order[1:], 1] == rows_n5[order[:-1], 1]
    rows = rows_n5[order[np.append(is_same, False) | np.append(False, is_same)]] if len(order) else rows_n5
    rows = rows[np.lexsort(rows.T)]  # by hash, then by image
    is_first = np.ones(len(rows), dtype=np.bool_)
    is_first[1:] = (rows[1:, 1:] != rows[:-1, 1:]).any(axis=1)
    firsts = rows[is_first, 0][np.cumsum(is_first) - 1]
    return np.column_stack([firsts, rows])[~is_first]
