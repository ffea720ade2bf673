"""The work of the ``images`` stage that takes many requests: listing a bucket or its inventory, and opening containers.
Where there is much of it, Ray tasks do it."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.config import Config, ImagesConfig, ResourcesConfig, StorageConfig
from icce_ray.errors import WorkerError
from icce_ray.images.bucket_listing import (
    ALL,
    MAX_AGE_S,
    NUM_THREADS,
    BucketPrefix,
    KeyRange,
    list_ranges,
    missing_ranges,
)
from icce_ray.images.containers import members
from icce_ray.images.file_shards import File
from icce_ray.images.inventory import Inventory, list_data_file, shard_name
from icce_ray.images.listing import entry_tables
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import MAX_IMAGES_HERE, runs_here
from icce_ray.runtime.workers import run_tasks
from icce_ray.store import ArtifactWriter, PartRecord, PartRecords, s3

NUM_TASKS = 16
"""Tasks that list a bucket at a time. A job that is killed loses a page of 1,000 keys of each of their threads, in all
no more than a shard of SHARD_ROWS."""
CONTAINERS_PER_TASK = 16
LARGE_BYTES = 2**30
"""Containers of this size together are opened in tasks."""
LARGE_INVENTORY_BYTES = 2**25
"""The same for the data files of an inventory, which are compressed."""


def list_bucket(prefix: BucketPrefix, resources: ResourcesConfig, progress: Progress) -> list[PartRecord]:
    """The records of all shards of a bucket. Those that an earlier, killed listing has finished are used again. Raises
    OSError, InputError, WorkerError: as :func:`list_ranges`; WorkerError: another job removed shards meanwhile."""
    oldest, pending = time.time() - MAX_AGE_S, deque[KeyRange]()
    finished = prefix.finished(oldest)
    if all(record.name != ALL for record in finished):
        prefix.records.remove(ALL)
        finished = prefix.without_overlaps(finished)
        if prefix.write_kept(missing_ranges(finished), oldest):
            finished = prefix.without_overlaps(prefix.finished(oldest))
        pending = deque(missing_ranges(finished))
    if finished and pending:
        progress.note("the listing that was begun goes on")
    while pending:
        num_keys = _num_keys(finished)
        # Most buckets are listed before Ray would have started.
        left, listed = list_ranges(list(pending), prefix)
        pending, num_keys = deque(left), num_keys + listed
        progress.update(num_keys, None)
        if pending:
            items = _Items(pending, 1 if runs_here(resources, num_keys) else NUM_TASKS)
            tasks = run_tasks("images", list_ranges, items, (prefix,), resources=resources, num_images=num_keys)
            for _, (left, listed) in tasks:
                items.num_running -= 1
                pending.extend(left)
                num_keys += listed
                progress.update(num_keys, None)
        found = prefix.finished(oldest)
        if _num_keys(found) < num_keys:
            raise WorkerError(
                f"{prefix.uri}: of {num_keys:,} keys that were listed, {_num_keys(found):,} are left in "
                f"{prefix.folder.uri}; has another job removed files there? The same command lists the rest again"
            )
        finished = prefix.without_overlaps(found)
        if len(finished) < len(found):
            pending = deque(missing_ranges(finished))
            continue
        everything = {"keys": ("", None), "ends": [], "others": {}, "tables": [], "num_keys": 0}
        everything["listed_at"] = min(record.metrics["listed_at"] for record in finished)
        prefix.records.write(ALL, (), everything | {"shards": [record.name for record in finished]})
    return [record for record in finished if record.files or record.metrics["others"] or record.metrics["tables"]]


def _num_keys(records: Sequence[PartRecord]) -> int:
    return sum(record.metrics["num_keys"] for record in records)


class _Items:
    """The pending ranges in items of several, at most `num_items` at a time. While tasks run, more may come, so the end
    is not final."""

    def __init__(self, pending: deque[KeyRange], num_items: int) -> None:
        self._pending, self._num_items, self.num_running = pending, num_items, 0

    def __iter__(self) -> _Items:
        return self

    def __next__(self) -> list[KeyRange]:
        if not self._pending or self.num_running >= self._num_items:
            raise StopIteration
        self.num_running += 1
        number = min(NUM_THREADS, math.ceil(len(self._pending) / self._num_items))
        return [self._pending.popleft() for _ in range(number)]


def open_containers(files: list[File], config: Config, writer: ArtifactWriter, progress: Progress) -> list[PartRecord]:
    """The members of containers: a record for each CONTAINERS_PER_TASK of `files`, in order. Its file is a table of
    their entries; its metrics are `rows`, for each container, and `skipped`. Finished ones are used again. Raises
    InputError: as :func:`members`."""
    waiting = iter(files)
    groups = list(iter(lambda: list(islice(waiting, CONTAINERS_PER_TASK)), []))
    if not groups:
        return []
    records = PartRecords(writer.folder, hashlib.sha256(config.images.model_dump_json().encode()).hexdigest())
    shared = (config.images, config.storage, writer, records)
    is_large = sum(file.size_bytes or 0 for file in files) >= LARGE_BYTES
    in_tasks = config.resources if is_large else None
    return _finish(open_group, groups, _group_name, records, shared, in_tasks, progress, "rows")


def list_inventory(inventory: Inventory, resources: ResourcesConfig, progress: Progress) -> list[PartRecord]:
    """The records of an inventory's data files. Finished ones are used again. Raises InputError: as
    :func:`list_data_file`."""
    in_tasks = resources if inventory.num_bytes >= LARGE_INVENTORY_BYTES else None
    files, records = inventory.files, inventory.records
    return _finish(list_data_file, files, shard_name, records, (inventory,), in_tasks, progress, "num_keys")


def _finish(
    function: Callable[..., PartRecord],
    items: Sequence[Any],
    name_of: Callable[[Any], str],
    records: PartRecords,
    shared: tuple[Any, ...],
    in_tasks: ResourcesConfig | None,
    progress: Progress,
    counted: str,
) -> list[PartRecord]:
    """The record of each item: the one that is there, or what ``function(item, *shared)`` makes now, in Ray tasks if
    their resources are given. `counted` is the metric that the progress adds up."""
    found = records.read_all(check_files=False)
    missing = [item for item in items if name_of(item) not in found]
    done: Iterable[tuple[Any, PartRecord]] = ((item, function(item, *shared)) for item in missing)
    if in_tasks is not None and missing:
        done = run_tasks("images", function, missing, shared, resources=in_tasks, num_images=MAX_IMAGES_HERE + 1)
    for item, record in done:
        found[name_of(item)] = record
        progress.update(sum(int(np.sum(each.metrics[counted])) for each in found.values()), None)
    return [found[name_of(item)] for item in items]


def _group_name(group: list[File]) -> str:
    digest = hashlib.sha256("\n".join(f"{file.uri}\0{file.etag}" for file in group).encode())
    return f"members-{digest.hexdigest()[:16]}"


def open_group(
    group: list[File], images: ImagesConfig, storage: StorageConfig, writer: ArtifactWriter, records: PartRecords
) -> PartRecord:
    """Open some containers, each in a thread; see :func:`open_containers`."""
    s3.use_s3(storage)

    def opened(file: File) -> tuple[pa.Table, Counter[str]]:
        skipped = Counter[str]()
        return pa.concat_tables(entry_tables(members(file, images, skipped))), skipped

    with ThreadPoolExecutor(CONTAINERS_PER_TASK) as threads:
        found = list(threads.map(opened, group))
    name = _group_name(group)
    part = ArtifactWriter(writer.folder).write_table(f"{name}.parquet", pa.concat_tables(table for table, _ in found))
    skipped = sum((each for _, each in found), Counter[str]())
    return records.write(name, [part], {"rows": [len(table) for table, _ in found], "skipped": skipped})
