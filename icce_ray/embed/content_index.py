"""Which image contents have an embedding already, and where: the same bytes are never embedded twice.

The parts of this and earlier ``embed`` artifacts of the same model under the same output serve as the cache. A
:class:`ContentIndex` knows the file and the row of each content, and which part is about to embed which, so that of two
parts with the same bytes one waits for the other. It holds no embeddings: readers fetch those from the files, or from
the worker that made them. A large index is divided by hash among several processes (:class:`ShardedIndex`).
"""

import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.embed.decode_and_embed import Outcome
from icce_ray.embed.embedding_parts import PART_NAME, read_hashes
from icce_ray.embed.part_hashes import KEY_BYTES, NO_FILE, Hashes, HashTable, Keys, hashes_name, num_hashes, to_bytes
from icce_ray.store import Artifact, Folder

LOAD_THREADS = 16
MAX_TIMES = 100
LOAD_TOGETHER = 64
"""Files of hashes that are read before their keys are added."""
CONTENTS_PER_SHARD = 100_000_000
"""3.2 GB in memory. Each shard reads the keys of all contents at its start."""

CLAIMED = np.uint32(2**32 - 1)
"""Stands for the row while a part is about to embed the content."""
YOURS, BUSY, HERE, AT = range(4)

Flags = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.uint32]


@dataclass
class Answers:
    """Where each of n contents is."""

    kinds_n: npt.NDArray[np.uint8]
    """AT: in a file. HERE: embedded by a part that is not written yet. YOURS: to be embedded by the part that asked.
    BUSY: being embedded by another."""
    rows_n: Rows
    """AT: the row in the file."""
    sources_n: npt.NDArray[np.int32]
    """AT, HERE: number of the source."""
    sources: list[Any]
    """AT: number of the folder and name of the part file. HERE: what was published, for :meth:`ContentIndex.fetch`."""


def keys_of(hashes: list[str]) -> Keys:
    """Hexadecimal hashes -> the keys by which the index knows them."""
    return to_keys(to_bytes(hashes))


def to_keys(hashes_nB: Hashes) -> Keys:
    return np.ascontiguousarray(hashes_nB[:, -KEY_BYTES:]).view(np.uint64)[:, 0]


def part_files(folder: Folder) -> dict[str, int]:
    """The part files of an ``embed`` artifact, and how many hashes the file beside each holds."""
    sizes = folder.sizes()
    return {name: num_hashes(sizes.get(hashes_name(name), 0)) for name in sorted(sizes) if PART_NAME.fullmatch(name)}


def num_shards(folders: Sequence[Folder], num_new: int) -> int:
    """Number of processes that the index of some folders and of `num_new` images is divided among."""
    known = sum(sum(part_files(folder).values()) for folder in folders)
    return math.ceil((known + num_new) / CONTENTS_PER_SHARD) or 1


class ContentIndex:
    """The index, or a shard of it with the contents that :class:`ShardedIndex` asks it for. Creating it reads the
    hashes of all parts in `folders`: ``embed`` artifacts of one model, finished or not, of which the first is being
    written. `num_new` images are to be embedded. Any thread may call it."""

    def __init__(self, folders: Sequence[Folder], num_new: int = 0, shard: int = 0, num_shards: int = 1) -> None:
        self._lock = threading.Lock()
        self._files: list[tuple[int, str]] = []
        self._numbers: dict[tuple[int, str], int] = {}
        self._published: dict[int, Any] = {}
        found = [
            (place, name, rows) for place, folder in enumerate(folders) for name, rows in part_files(folder).items()
        ]
        self._table = HashTable((sum(rows for *_, rows in found) + num_new) // num_shards)

        def load(place: int, name: str, num_rows: int) -> tuple[Keys, Rows]:
            hashes = read_hashes(folders[place], name, KEY_BYTES, num_rows)
            keys = to_keys(hashes.hashes_nB) if hashes else np.empty(0, np.uint64)
            ours = np.flatnonzero(_shards(keys, num_shards) == shard)
            return keys[ours], ours.astype(np.uint32)

        with ThreadPoolExecutor(LOAD_THREADS) as threads:
            for start in range(0, len(found), LOAD_TOGETHER):
                places, names, num_rows = zip(*found[start : start + LOAD_TOGETHER], strict=True)
                loaded = list(threads.map(load, places, names, num_rows))
                numbers = np.array([self._number(*file) for file in zip(places, names, strict=True)], np.uint32)
                keys, rows = (np.concatenate(arrays) for arrays in zip(*loaded, strict=True))
                slots = self._table.insert(keys)
                new = self._table.files[slots] == NO_FILE
                # Backwards: of equal contents, the first one counts.
                slots, rows = slots[new][::-1], rows[new][::-1]
                self._table.files[slots] = np.repeat(numbers, [len(part) for part, _ in loaded])[new][::-1]
                self._table.rows[slots] = rows

    def __repr__(self) -> str:
        return "embed: content index"

    def known(self, keys: Keys) -> Flags:
        """Which of the contents have an embedding on storage."""
        with self._lock:
            slots = self._table.find(keys)
            stored: Flags = (self._table.files[slots] < NO_FILE) & (self._table.rows[slots] != CLAIMED)
        return stored & (slots >= 0)

    def claim(self, part: str, keys: Keys, force: bool = False) -> Answers:
        """Where the contents are; those that are nowhere are for `part` to embed. With `force`, it takes over those of
        a part that does not seem to finish."""
        with self._lock:
            number = self._number(0, part)
            slots = self._table.insert(keys)
            files, rows = self._table.files[slots], self._table.rows[slots]
            claimed = (files != NO_FILE) & (rows == CLAIMED)
            ours = (files == NO_FILE) | (claimed & ((files == number) | force))
            self._table.files[slots[ours]], self._table.rows[slots[ours]] = number, CLAIMED
            published = [holder for holder in np.unique(files[claimed & ~ours]).tolist() if holder in self._published]
            kinds = np.full(len(keys), AT, np.uint8)
            kinds[claimed] = BUSY
            kinds[claimed & np.isin(files, published)] = HERE
            kinds[ours] = YOURS
            answers = Answers(kinds, rows, np.zeros(len(keys), np.int32), [])
            for kind, source_of in ((HERE, self._published.__getitem__), (AT, self._files.__getitem__)):
                numbers, answers.sources_n[kinds == kind] = np.unique(files[kinds == kind], return_inverse=True)
                answers.sources_n[kinds == kind] += len(answers.sources)
                answers.sources += map(source_of, numbers.tolist())
        return answers

    def publish(self, part: str, keys: Keys, outcomes: Any) -> None:
        """Provide what `part` embedded to others until it is written."""
        with self._lock:
            self._published[self._number(0, part)] = outcomes

    def fetch(self, published: dict[str, Outcome]) -> dict[str, Outcome]:
        """What a part published. Raises LookupError: it is gone."""
        return published

    def finish(self, part: str, keys: Keys, rows: Rows) -> None:
        """The part was written to the first folder, with these contents in these rows; CLAIMED: they have failed."""
        with self._lock:
            number = self._number(0, part)
            self._published.pop(number, None)
            slots = self._table.insert(keys)
            stored = rows != CLAIMED
            self._table.files[slots[stored]], self._table.rows[slots[stored]] = number, rows[stored]
            failed = slots[~stored]
            self._table.files[failed[self._table.files[failed] == number]] = NO_FILE

    def forget(self, place: int, part: str) -> None:
        """A part can no longer be read."""
        with self._lock:
            gone = (self._table.files == self._number(place, part)) & (self._table.rows != CLAIMED)
            self._table.files[gone] = NO_FILE

    def _number(self, place: int, part: str) -> int:
        if (place, part) not in self._numbers:
            self._numbers[place, part] = len(self._files)
            self._files.append((place, part))
        return self._numbers[place, part]


def _shards(keys: Keys, num_shards: int) -> npt.NDArray[np.uint64]:
    return (keys >> np.uint64(40)) % np.uint64(num_shards)  # by other bits than those that choose the bucket


@dataclass(frozen=True)
class ShardedIndex:
    """A :class:`ContentIndex` in other processes, divided by hash."""

    num_shards: int
    call: Callable[[str, dict[int, tuple[Any, ...]]], dict[int, Any]]
    """Calls a method of some shards with these arguments, all at once; returns their answers."""
    put: Callable[[dict[str, Outcome]], Any]
    """Keeps outcomes where other processes can get them; returns what is sent to the index in their place."""
    get: Callable[[Any], dict[str, Outcome]]
    """The outcomes. Raises LookupError: they are gone."""

    def known(self, keys: Keys) -> Flags:
        known = np.zeros(len(keys), np.bool_)
        for places, answer in self._ask("known", keys, lambda places: (keys[places],)):
            known[places] = answer
        return known

    def claim(self, part: str, keys: Keys, force: bool = False) -> Answers:
        num = len(keys)
        whole = Answers(np.zeros(num, np.uint8), np.zeros(num, np.uint32), np.zeros(num, np.int32), [])
        for places, answer in self._ask("claim", keys, lambda places: (part, keys[places], force)):
            whole.kinds_n[places], whole.rows_n[places] = answer.kinds_n, answer.rows_n
            whole.sources_n[places] = answer.sources_n + len(whole.sources)
            whole.sources += answer.sources
        return whole

    def publish(self, part: str, keys: Keys, outcomes: dict[str, Outcome]) -> None:
        kept = self.put(outcomes)
        self._ask("publish", keys, lambda places: (part, keys[places], kept))

    def fetch(self, published: Any) -> dict[str, Outcome]:
        return self.get(published)

    def finish(self, part: str, keys: Keys, rows: Rows) -> None:
        self._ask("finish", keys, lambda places: (part, keys[places], rows[places]))

    def forget(self, place: int, part: str) -> None:
        self.call("forget", dict.fromkeys(range(self.num_shards), (place, part)))

    def _ask(
        self, method: str, keys: Keys, arguments: Callable[[npt.NDArray[np.int64]], tuple[Any, ...]]
    ) -> list[tuple[npt.NDArray[np.int64], Any]]:
        """Ask the shards that the keys belong to: the positions in `keys` that each was asked for, and its answer."""
        shards = _shards(keys, self.num_shards)
        places = {shard: np.flatnonzero(shards == shard) for shard in np.unique(shards).tolist()}
        answers = self.call(method, {shard: arguments(found) for shard, found in places.items()})
        return [(found, answers[shard]) for shard, found in places.items()]


Index = ContentIndex | ShardedIndex


def siblings(root: Folder, own: Folder, model: str, num_images: int) -> list[Folder]:
    """The folders of other ``embed`` artifacts below `root` made by the same model, finished or not. One with more than
    MAX_TIMES the `num_images` to be embedded is left out: reading its hashes would take longer."""
    found = []
    for folder in (root / name for name in root.folder_names()):
        artifact = Artifact.read(folder)
        is_large = artifact is not None and artifact.metrics.get("num_images", 0) > MAX_TIMES * num_images
        if folder.uri == own.uri or is_large:
            continue
        first = next(iter(part_files(folder).items()), None)
        hashes = read_hashes(folder, first[0], KEY_BYTES, first[1]) if first is not None else None
        if hashes is not None and hashes.model == hashlib.sha256(model.encode()).digest():
            found.append(folder)
    return found
