"""Keys per second of listing a bucket on a stub that takes 100 ms a page: page by page, and with 16 threads. Then what
16 tasks lose that are killed at 90%.

The tasks are threads of a process that kills itself; `again` is what the stub had answered and storage does not have.
The keys are invented, and answered as XML to boto3's client in place of the network: waiting, parsing and our own work
count. `botocore` is the same page as its parser reads it. Where other work shares the CPUs, look at the keys for each
second of CPU: one process lists with one CPU, and Ray tasks on others multiply that.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from cases import show_aim

SETTINGS: dict[str, Any] = {
    "num_keys": 1_500_000,
    "page_s": 0.1,
    "killed_at": 0.9,
    "min_keys_per_s": 100_000,
    "num_tasks": 16,
}
PAGE_KEYS = 1000
CONTENTS = (
    "<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    "<ETag>&quot;d41d8cd98f00b204e9800998ecf8427e&quot;</ETag><Size>100000</Size>"
    "<StorageClass>STANDARD</StorageClass></Contents>"
)


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    from icce_ray.config import StorageConfig
    from icce_ray.images.bucket_listing import NUM_THREADS, missing_ranges
    from icce_ray.images.file_shards import SHARD_ROWS
    from icce_ray.store import s3

    num_keys = settings["num_keys"]
    store = _open_store(settings)
    by_botocore = _rate_of_botocore(store.page("", PAGE_KEYS))
    print(f"botocore's parser alone {by_botocore:,.0f} keys for each second of CPU")
    began = time.perf_counter()
    for _ in zip(range(30), s3.list_pages("s3://photos/all/", StorageConfig()), strict=False):
        pass
    before = 30 * PAGE_KEYS / (time.perf_counter() - began)
    print(f"page by page {before:12,.0f} keys/s", flush=True)
    with tempfile.TemporaryDirectory() as place:
        store.num_pages, cpu_began = 0, time.process_time()
        found, seconds = _listed(place)
        cpu_s = time.process_time() - cpu_began
        num_requests = store.num_pages + store.num_probes
    print(
        f"in ranges    {num_keys / seconds:12,.0f} keys/s, {num_keys / cpu_s:,.0f} for each second of CPU; "
        f"{num_requests:,} requests for {num_keys // PAGE_KEYS:,} pages",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as place:
        answered = np.memmap(f"{place}/answered", np.uint8, "w+", shape=(num_keys,))
        killed = multiprocessing.get_context("spawn").Process(target=_list_until_killed, args=(place, settings))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        prefix = _prefix(place)
        prefix.write_kept(missing_ranges(prefix.without_overlaps(prefix.finished(0.0))), 0.0)
        is_lost = np.zeros(num_keys, np.bool_)
        for after, until in missing_ranges(prefix.without_overlaps(prefix.finished(0.0))):
            ends = [bisect_right(range(num_keys), f"all/{end}", key=_key) for end in (after, until or "~")]
            is_lost[slice(*ends)] = True
        num_answered, again = int((answered > 0).sum()), int((is_lost & (answered > 0)).sum())
        resumed, _ = _listed(place, settings["num_tasks"])
    print(f"{settings['num_tasks']} tasks killed at {num_answered:,} keys: {again:,} of them are listed again")
    wanted, num_tasks = settings["min_keys_per_s"], settings["num_tasks"]
    possible = num_tasks * min(num_keys / cpu_s, NUM_THREADS * PAGE_KEYS / settings["page_s"])
    print(f"{num_tasks} tasks with a CPU each: {possible:,.0f} keys/s")
    show_aim("keys a second", f"{before:,.0f} page by page", f"{possible:,.0f} with {num_tasks} tasks", f"{wanted:,}")
    bounds = {
        f"{num_tasks} tasks with a CPU each: over {wanted:,} keys/s": possible > wanted,
        f"two CPUs: over {wanted:,} keys/s": 2 * num_keys / cpu_s > wanted,
        "every key is listed": found == resumed == num_keys,
        f"after a kill at most a shard of {SHARD_ROWS:,} keys is listed again": again <= SHARD_ROWS,
    }
    rates = {
        "page_by_page": before,
        "in_ranges": num_keys / seconds,
        "per_cpu_s": num_keys / cpu_s,
        "botocore_per_cpu_s": by_botocore,
    }
    return rates | {"requests": num_requests, "answered": num_answered, "again": again}, bounds


def _open_store(settings: dict[str, Any]) -> _Store:
    from icce_ray.config import StorageConfig
    from icce_ray.store import s3

    store = _Store(settings["num_keys"], settings["page_s"])
    client = s3.client(StorageConfig(region="us-east-1", access_key="x", secret_key="x"))
    client.meta.events.register("before-send.s3", store.answer)
    s3.client = lambda *_, **__: client  # type: ignore[assignment]
    return store


def _prefix(place: str) -> Any:
    from icce_ray.config import StorageConfig
    from icce_ray.images.bucket_listing import BucketPrefix
    from icce_ray.images.file_kinds import take_file
    from icce_ray.store import Folder

    return BucketPrefix("s3://photos/all/", Folder.at(place), StorageConfig(), take_file)


def _listed(place: str, num_tasks: int = 1) -> tuple[int, float]:
    """(files, seconds)"""
    from icce_ray.config import ResourcesConfig
    from icce_ray.images import job
    from icce_ray.runtime.progress import Progress

    def run_tasks(stage: str, function: Any, items: Any, shared: Any, **_: Any) -> Iterator[Any]:
        with ThreadPoolExecutor(num_tasks) as threads:
            running: dict[Any, Any] = {}
            while True:
                while len(running) < num_tasks and (item := next(items, None)) is not None:
                    running[threads.submit(function, item, *shared)] = item
                if not running:
                    return
                ready = wait(running, return_when=FIRST_COMPLETED).done.pop()
                yield running.pop(ready), ready.result()

    job.run_tasks, job.runs_here = run_tasks, lambda *_: num_tasks == 1  # type: ignore[assignment]
    began = time.perf_counter()
    records = job.list_bucket(_prefix(place), ResourcesConfig(), Progress("images", quiet=True))
    return sum(part.rows or 0 for record in records for part in record.files), time.perf_counter() - began


def _list_until_killed(place: str, settings: dict[str, Any]) -> None:
    store = _open_store(settings)
    store.killed_at = settings["killed_at"] * settings["num_keys"]
    store.answered = np.memmap(f"{place}/answered", np.uint8, "r+", shape=(settings["num_keys"],))
    _listed(place, settings["num_tasks"])


class _Store:
    """Answers the requests of boto3's client: keys ``all/00000000.jpg`` and so on."""

    def __init__(self, num_keys: int, page_s: float) -> None:
        self.num_keys, self.page_s = num_keys, page_s
        self.num_pages, self.killed_at = 0, 2.0 * num_keys
        self.answered = np.zeros(num_keys, np.uint8)
        self.num_probes = 0
        """Requests for a single key, to find out where to divide a range."""

    def answer(self, request: Any, **_: Any) -> Any:
        from botocore.awsrequest import AWSResponse

        asked = dict(parse_qsl(urlsplit(request.url).query))
        max_keys = int(asked.get("max-keys", PAGE_KEYS))
        if max_keys == 1:
            self.num_probes += 1
        else:
            self.num_pages += 1
        if np.count_nonzero(self.answered) >= self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.page_s)
        after = asked.get("continuation-token", asked.get("start-after", ""))
        body = self.page(after, max_keys)
        return AWSResponse(request.url, 200, {}, SimpleNamespace(stream=lambda *_: iter([body])))

    def page(self, after: str, max_keys: int) -> bytes:
        start = bisect_right(range(self.num_keys), after, key=_key)
        stop = min(start + max_keys, self.num_keys)
        self.answered[start:stop] |= max_keys > 1
        contents = "".join(CONTENTS.format(_key(number)) for number in range(start, stop))
        more = f"<NextContinuationToken>{_key(stop - 1)}</NextContinuationToken>" if stop < self.num_keys else ""
        is_truncated = str(stop < self.num_keys).lower()
        return (
            f"<ListBucketResult>{contents}<IsTruncated>{is_truncated}</IsTruncated>{more}</ListBucketResult>".encode()
        )


def _key(number: int) -> str:
    return f"all/{number:08d}.jpg"


def _rate_of_botocore(body: bytes) -> float:
    """Keys that botocore's own parser reads in a second of CPU."""
    import botocore.session
    from botocore.parsers import create_parser

    session = botocore.session.get_session()
    shape = session.get_service_model("s3").operation_model("ListObjectsV2").output_shape
    began = time.process_time()
    for _ in range(5):
        create_parser("rest-xml").parse({"status_code": 200, "headers": {}, "body": body}, shape)
    return 5 * PAGE_KEYS / (time.process_time() - began)
