"""Keys per second of listing a bucket on a stub that takes 100 ms a page: page by page, with 16 threads, and again
after a kill at 90%.

The keys are invented, and so is the S3 client: only waiting and our own work count. Where other work shares the CPUs,
look at the keys for each second of CPU.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {"num_keys": 1_500_000, "page_s": 0.1, "killed_at": 0.9, "min_keys_per_s": 100_000}
PAGE_KEYS = 1000


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    from icce_ray.config import ResourcesConfig, StorageConfig
    from icce_ray.images.bucket_listing import NUM_THREADS, SHARD_KEYS, BucketPrefix
    from icce_ray.images.file_kinds import take_file
    from icce_ray.images.job import list_bucket
    from icce_ray.runtime.progress import Progress
    from icce_ray.runtime.ray_cluster import run_here
    from icce_ray.store import Folder, s3

    num_keys = settings["num_keys"]
    store = _Store(num_keys, settings["page_s"])
    s3.client = lambda *_, **__: store  # type: ignore[assignment]

    def listed(place: str) -> tuple[int, float]:
        """(files, seconds)"""
        prefix = BucketPrefix("s3://photos/all/", Folder.at(place), StorageConfig(), take_file)
        began = time.perf_counter()
        with run_here(1):
            records = list_bucket(prefix, ResourcesConfig(), Progress("images", quiet=True))
        return sum(part.rows or 0 for record in records for part in record.files), time.perf_counter() - began

    began = time.perf_counter()
    for _ in zip(range(30 * PAGE_KEYS), s3.list_objects("s3://photos/all/", StorageConfig()), strict=False):
        pass
    before = 30 * PAGE_KEYS / (time.perf_counter() - began)
    print(f"page by page {before:12,.0f} keys/s", flush=True)
    with tempfile.TemporaryDirectory() as place:
        store.num_pages, cpu_began = 0, time.process_time()
        found, seconds = listed(place)
        cpu_s = time.process_time() - cpu_began
        num_requests = store.num_pages
    print(
        f"in ranges    {num_keys / seconds:12,.0f} keys/s, {num_keys / cpu_s:,.0f} for each second of CPU; "
        f"{num_requests:,} requests for {num_keys // PAGE_KEYS:,} pages",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as place:
        store.num_pages, store.max_pages = 0, int(settings["killed_at"] * num_requests)
        try:
            listed(place)
        except KeyboardInterrupt:
            kept = sum(1 for path in Path(place).rglob("*.json"))
        store.num_pages, store.max_pages = 0, 10**9
        resumed, _ = listed(place)
        again = store.num_pages - (1 - settings["killed_at"]) * num_requests
    print(f"killed at {settings['killed_at']:.0%}: {kept} shards kept, {again:,.0f} requests made twice")
    bounds = {
        f"over {settings['min_keys_per_s']:,} keys/s": num_keys / seconds > settings["min_keys_per_s"],
        "every key is listed": found == resumed == num_keys,
        "after a kill each thread repeats at most a shard": again <= NUM_THREADS * (SHARD_KEYS // PAGE_KEYS + 1),
    }
    rates = {"page_by_page": before, "in_ranges": num_keys / seconds, "per_cpu_s": num_keys / cpu_s}
    return rates | {"requests": num_requests, "again": again}, bounds


class _Store:
    """Stands for boto3's client: keys ``all/00000000.jpg`` and so on."""

    def __init__(self, num_keys: int, page_s: float) -> None:
        self.num_keys, self.page_s = num_keys, page_s
        self.num_pages, self.max_pages = 0, 10**9

    def list_objects_v2(self, Bucket: str, Prefix: str, MaxKeys: int = PAGE_KEYS, **settings: str) -> dict[str, Any]:
        after = settings.get("ContinuationToken", settings.get("StartAfter", ""))
        self.num_pages += 1
        if self.num_pages > self.max_pages:
            raise KeyboardInterrupt
        time.sleep(self.page_s)
        start = self._first_behind(after)
        stop = min(start + MaxKeys, self.num_keys)
        found = [{"Key": f"all/{n:08d}.jpg", "Size": 100_000, "ETag": '"0"'} for n in range(start, stop)]
        last = found[-1]["Key"] if found else ""
        return {"Contents": found, "IsTruncated": stop < self.num_keys, "NextContinuationToken": last}

    def _first_behind(self, after: str) -> int:
        low, high = 0, self.num_keys
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if f"all/{middle:08d}.jpg" <= after else (low, middle)
        return low
