"""List a bucket by ranges of keys, many at a time: a request answers with 1,000 keys at most, and takes its time.

A thread without work takes over the upper part of the range of another. Where to divide it is found by asking for the
first key behind a point between its ends. What a thread has listed is written as a shard every few seconds, and each
page is kept until then: a listing that was killed goes on where it was.
"""

import hashlib
import json
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from icce_ray.config import StorageConfig
from icce_ray.images.file_shards import File, ends_of, files_table, sorted_files
from icce_ray.store import ArtifactWriter, Folder, PartRecord, PartRecords, s3

NUM_THREADS = 16
SHARD_KEYS = 20_000
"""Keys after which a thread writes a shard."""
CALL_S = 5.0
"""Time after which :func:`list_ranges` returns with what is left, so that it can be divided anew."""
IDLE_S = 0.02
MIN_PAGES = 3
"""Pages of a call after which ranges are divided: fewer are not worth it."""
MAX_AGE_S = 24 * 3600.0
"""Shards that are older are listed again: the bucket may have changed."""
ALL = "all"
"""The record of a finished listing. It names the records of the shards and has no files itself."""
KEPT_NAME = "kept"
"""The folder of pages that are in no shard yet."""
LOWEST, HIGHEST_ASCII, HIGHEST = 0x20, 0x7F, 0x10FFFF
SURROGATES = range(0xD800, 0xE000)

Classify = Callable[[File, Counter[str], list[File]], File | None]
Entry = tuple[str, int | None, str | None]
"""Key without the prefix, size, ETag."""


class KeyRange(NamedTuple):
    """The keys with ``after < key <= until``, without the prefix."""

    after: str
    until: str | None
    """None: to the end."""


@dataclass(frozen=True)
class BucketPrefix:
    """The prefix that is listed. It can be pickled."""

    uri: str
    """``s3://bucket/prefix/``, or a bucket."""
    folder: Folder
    """Shards and records are written here."""
    storage: StorageConfig
    classify: Classify
    """Returns a file to list, or None after counting it or putting it aside. Hidden files are not shown to it."""

    @property
    def records(self) -> PartRecords:
        return PartRecords(self.folder, hashlib.sha256(self.uri.encode()).hexdigest())

    def finished(self, oldest: float) -> list[PartRecord]:
        """The records of the ranges that were listed since `oldest`, in seconds since 1970. ALL, of all keys, is among
        them only if all records are there that it names."""
        records = self.records.read_all(check_files=False)
        if ALL in records and not records.keys() >= set(records[ALL].metrics["shards"]):
            del records[ALL]
        return [record for record in records.values() if record.metrics["listed_at"] >= oldest]

    def without_overlaps(self, finished: Sequence[PartRecord]) -> list[PartRecord]:
        """Removes the records of keys that others have: a task whose worker died listed them and was repeated."""
        kept: list[PartRecord] = []
        until: str | None = ""
        for record in sorted(finished, key=lambda record: _keys_of(record).after):
            if until is not None and _keys_of(record).after >= until:
                kept.append(record)
                until = _keys_of(record).until
            else:
                self.records.remove(record.name)
        return kept

    def write(self, keys: KeyRange, entries: Sequence[Entry], listed_at: float) -> None:
        """Write and record a shard: all `entries` of a range."""
        bucket, start = s3.split_uri(self.uri)
        others, tables = Counter[str](), list[File]()
        found = (object_file(f"s3://{bucket}/{start}", entry, self.classify, others, tables) for entry in entries)
        table = sorted_files(files_table([file for file in found if file is not None]))
        name = hashlib.sha256(keys.after.encode()).hexdigest()[:16]
        parts = [ArtifactWriter(self.folder).write_table(f"files/{name}.parquet", table)] if len(table) else []
        ends = [ends_of(table)] if len(table) else []
        metrics = {"keys": keys, "ends": ends, "others": others, "tables": tables, "listed_at": listed_at}
        self.records.write(name, parts, metrics | {"num_keys": len(entries)})

    def write_kept(self, missing: Sequence[KeyRange], oldest: float) -> bool:
        """Write shards of the pages within the `missing` ranges that killed calls had kept since `oldest`. Returns
        whether there were any."""
        kept, source = self.folder / KEPT_NAME, self.records.source

        def write(name: str) -> None:
            for (after, until), entries, listed_at in json.loads(kept.read_bytes(name)):
                ends = [gap.until for gap in missing if gap.after <= after]
                if listed_at >= oldest and any(end is None or (until and until <= end) for end in ends):
                    self.write(KeyRange(after, until), entries, listed_at)
            kept.remove(name)

        names = [name for name in kept.sizes() if name.startswith(source)]
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            list(threads.map(write, names))
        return bool(names)


def object_file(root: str, entry: Entry, classify: Classify, others: Counter[str], tables: list[File]) -> File | None:
    """An object below `root` as a file; None if it is not listed."""
    key, num_bytes, etag = entry
    if key.startswith(".") or "/." in key:
        others["hidden"] += 1
        return None
    if not key or key.endswith("/"):
        return None
    return classify(File(root + key, num_bytes, etag and etag.strip('"')), others, tables)


def _keys_of(record: PartRecord) -> KeyRange:
    return KeyRange(*record.metrics["keys"])


def missing_ranges(finished: Sequence[PartRecord]) -> list[KeyRange]:
    """The ranges of keys that the finished ones leave."""
    missing, position = [], ""
    for keys in sorted(map(_keys_of, finished), key=lambda keys: keys.after):
        if keys.after > position:
            missing.append(KeyRange(position, keys.after))
        if keys.until is None:
            return missing
        position = max(position, keys.until)
    return [*missing, KeyRange(position, None)]


def list_ranges(ranges: Sequence[KeyRange], prefix: BucketPrefix) -> tuple[list[KeyRange], int]:
    """List ranges of keys for CALL_S. Returns what is left of the ranges, and the number of keys that were listed.
    Raises OSError, InputError, WorkerError: the storage, as :func:`s3.patiently`."""
    s3.use_s3(prefix.storage)
    calls = _Call(prefix, ranges)
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        list(threads.map(calls.work, range(NUM_THREADS)))
        list(threads.map(prefix.folder.remove, calls.kept))
    return [*calls.left, *calls.pending], calls.num_keys


@dataclass(eq=False)
class _Walk:
    """A range that a thread lists: up to `position` it has. Another thread may lower `until` to a point behind it."""

    position: str
    until: str | None
    tried: set[str] = field(default_factory=set)
    """Points at which it was, or could not be, divided."""


class _Call:
    """One call of :func:`list_ranges`."""

    def __init__(self, prefix: BucketPrefix, ranges: Sequence[KeyRange]) -> None:
        self.prefix, self.pending = prefix, deque(ranges)
        self.left: list[KeyRange] = []
        self.num_keys = self._num_pages = self._turn = 0
        self.kept: list[str] = []  # files of pages
        self._walks: list[_Walk] = []
        self._lock, self._keeping = threading.Lock(), threading.Lock()
        self._unkept: list[tuple[KeyRange, list[Entry], float]] = []
        self._ends = time.monotonic() + CALL_S
        self._key = s3.split_uri(prefix.uri)[1]
        self._name = f"{KEPT_NAME}/{prefix.records.source}-{uuid.uuid4().hex}"

    def work(self, thread: int) -> None:
        try:
            while time.monotonic() < self._ends:
                with self._lock:
                    walk = _Walk(*self.pending.popleft()) if self.pending else None
                    self._walks += [walk] if walk else []
                walk = walk or self._take_over(thread)
                if walk:
                    self._list(walk)
                elif self._walks:
                    time.sleep(IDLE_S)
                else:
                    return
        except BaseException:
            self._ends = 0.0
            raise

    def _list(self, walk: _Walk) -> None:
        entries, after = list[Entry](), walk.position
        while True:
            start = walk.position
            found, is_truncated = self._page(start)
            with self._lock:
                self._num_pages += 1
                until = walk.until
                walk.position = found[-1][0] if found else walk.position
                is_finished = not is_truncated or (until is not None and walk.position >= until)
                if is_finished:
                    self._walks.remove(walk)
            found = [entry for entry in found if until is None or entry[0] <= until]
            entries += found
            is_over = time.monotonic() >= self._ends
            end = until if is_finished else walk.position
            if is_finished or is_over or len(entries) >= SHARD_KEYS:
                self.prefix.write(KeyRange(after, end), entries, time.time())
                with self._lock:
                    self.num_keys += len(entries)
                entries, after = [], walk.position
            else:
                self._keep(KeyRange(start, end), found)
            if is_over and not is_finished:
                with self._lock:
                    self._walks.remove(walk)
                    self.left.append(KeyRange(walk.position, walk.until))
            if is_over or is_finished:
                return

    def _keep(self, keys: KeyRange, entries: list[Entry]) -> None:
        """Write a page that is in no shard yet, together with those of other threads that wait. So a job that is killed
        loses one page of each thread."""
        with self._lock:
            self._unkept.append((keys, entries, time.time()))
        with self._keeping:
            with self._lock:
                pages, self._unkept = self._unkept, []
            if pages:
                name = f"{self._name}-{len(self.kept):06d}.json"
                self.prefix.folder.write_bytes(name, json.dumps(pages).encode())
                self.kept.append(name)

    def _take_over(self, thread: int) -> _Walk | None:
        """Divide the range of another thread; None if that did not work."""
        with self._lock:
            if not self._walks or self._num_pages < MIN_PAGES:
                return None
            self._turn += 1
            other = self._walks[self._turn % len(self._walks)]
            position, until = other.position, other.until
            untried = (point for point in _points_between(position, until, thread) if point not in other.tried)
            point = next(untried, None)
            if point is None:
                return None
            other.tried.add(point)
        found, _ = self._page(point, MaxKeys=1)
        is_empty = not found or (until is not None and found[0][0] > until)
        with self._lock:
            is_inside = other.position < point and (other.until is None or point < other.until)
            if other not in self._walks or not is_inside:
                return None
            walk = _Walk(point, other.until)
            other.until = point
            if is_empty:
                return None
            self._walks.append(walk)
            return walk

    def _page(self, after: str, **settings: Any) -> tuple[list[Entry], bool]:
        """The entries of a page, and whether there are more behind them."""
        start = {"StartAfter": self._key + after} if after else {}
        pages = s3.list_pages(self.prefix.uri, self.prefix.storage, **start, **settings)
        # A store may answer with no keys although there are more.
        page = next(page for page in pages if page.get("Contents") or not page.get("IsTruncated"))
        contents, start_of_key = page.get("Contents", ()), len(self._key)
        found = [(entry["Key"][start_of_key:], entry["Size"], entry["ETag"]) for entry in contents]
        return found, bool(page.get("IsTruncated"))


def _points_between(after: str, until: str | None, thread: int) -> Iterator[str]:
    """Points between the ends of a range, each thread's first choice elsewhere: at the first character in which keys
    of the range may differ, then at the next, and so on."""
    common = 0
    while until is not None and common < min(len(after), len(until)) and after[common] == until[common]:
        common += 1
    for place in range(common, len(after) + 1):
        low = ord(after[place]) if place < len(after) else LOWEST - 1
        is_below = until is None or place > common or len(until) <= common
        high = (HIGHEST_ASCII if low < HIGHEST_ASCII - 1 else HIGHEST) if is_below else ord(until[common])  # type: ignore[index]
        if high - low < 2:
            continue
        step = (high - low) / (NUM_THREADS + 1)
        code = low + min(high - low - 1, max(1, round(step * (thread + 1))))
        yield after[:place] + chr(SURROGATES.start - 1 if code in SURROGATES else code)
