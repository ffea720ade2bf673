"""What takes many requests in the ``images`` stage: a bucket is listed and containers are opened, in Ray tasks where
there is much to do."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa

from icce_ray.config import Config, ImagesConfig, ResourcesConfig, StorageConfig
from icce_ray.images.bucket_listing import MAX_AGE_S, NUM_THREADS, BucketPrefix, KeyRange, list_ranges, missing_ranges
from icce_ray.images.containers import members
from icce_ray.images.file_shards import File
from icce_ray.images.listing import entry_tables
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import runs_here
from icce_ray.runtime.workers import run_tasks
from icce_ray.store import ArtifactWriter, s3
from icce_ray.store.part_records import PartRecord, PartRecords

NUM_ITEMS = 16
"""Tasks that a bucket is divided among at least."""
CONTAINERS_PER_TASK = 16
LARGE_BYTES = 2**30
"""Containers of this size together are opened in tasks."""


def list_bucket(prefix: BucketPrefix, resources: ResourcesConfig, progress: Progress) -> list[PartRecord]:
    """The records of all shards of a bucket. Those that an earlier, killed listing has finished are used again.

    Raises:
        OSError, InputError, WorkerError: as :func:`list_ranges`.
    """
    oldest = time.time() - MAX_AGE_S
    pending = deque(missing_ranges(finished := prefix.finished(oldest)))
    if finished and pending:
        progress.note("the listing that was begun goes on")
    num_keys = sum(record.metrics["num_keys"] for record in finished)
    if pending:
        # Most buckets are listed before Ray would have started.
        left, listed = list_ranges(list(pending), prefix)
        pending, num_keys = deque(left), num_keys + listed
        progress.update(num_keys, None)
        if pending:
            items = _Items(pending, 1 if runs_here(resources, num_keys) else NUM_ITEMS)
            tasks = run_tasks("images", list_ranges, items, (prefix,), resources=resources, num_images=num_keys)
            for _, (left, listed) in tasks:
                pending.extend(left)
                num_keys += listed
                progress.update(num_keys, None)
        finished = prefix.finished(oldest)
        everything = {"keys": ("", None), "ends": [], "others": {}, "tables": [], "num_keys": 0}
        listed_at = min(record.metrics["listed_at"] for record in finished)
        prefix.records.write("all", (), everything | {"listed_at": listed_at})
    return [record for record in finished if record.files or record.metrics["others"] or record.metrics["tables"]]


class _Items:
    """The pending ranges in items of several. While tasks run, more may come, so the end is not final."""

    def __init__(self, pending: deque[KeyRange], num_items: int) -> None:
        self._pending, self._num_items = pending, num_items

    def __iter__(self) -> _Items:
        return self

    def __next__(self) -> list[KeyRange]:
        if not self._pending:
            raise StopIteration
        number = min(NUM_THREADS, math.ceil(len(self._pending) / self._num_items))
        return [self._pending.popleft() for _ in range(number)]


def open_containers(files: list[File], config: Config, writer: ArtifactWriter, progress: Progress) -> list[PartRecord]:
    """The members of containers: a record for each CONTAINERS_PER_TASK of `files`, in order. Its file is a table of
    their entries; its metrics are `rows`, for each container, and `skipped`. Finished ones are used again.

    Raises:
        InputError: as :func:`members`.
    """
    images, resources = config.images, config.resources
    waiting = iter(files)
    groups = list(iter(lambda: list(islice(waiting, CONTAINERS_PER_TASK)), []))
    records = PartRecords(writer.folder, hashlib.sha256(images.model_dump_json().encode()).hexdigest())
    found = records.read_all(check_files=False) if groups else {}
    missing = [group for group in groups if _group_name(group) not in found]
    num_bytes = sum(file.size_bytes or 0 for group in missing for file in group)
    shared = (images, config.storage, writer, records)
    opened: Iterable[tuple[Any, PartRecord]] = ((group, open_group(group, *shared)) for group in missing)
    if num_bytes >= LARGE_BYTES:
        opened = run_tasks(
            "images", open_group, missing, shared, resources=resources, num_images=num_bytes // 2**16, name="open"
        )
    num_images = sum(sum(record.metrics["rows"]) for record in found.values())
    for group, record in opened:
        found[_group_name(group)] = record
        num_images += sum(record.metrics["rows"])
        progress.update(num_images, None)
    return [found[_group_name(group)] for group in groups]


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
