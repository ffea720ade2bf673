"""Listing a bucket in ranges, with a stub of the S3 client that invents nothing but waits."""

from __future__ import annotations

import bisect
import threading
import time
from collections import Counter, deque
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from icce_ray.config import Config, ResourcesConfig, StorageConfig
from icce_ray.errors import BusyError, InputError, WorkerError
from icce_ray.images import bucket_listing, image_files, job, list_images
from icce_ray.images.bucket_listing import BucketPrefix, KeyRange, list_ranges, missing_ranges
from icce_ray.images.file_kinds import describe, take_file
from icce_ray.images.file_shards import SHARD_ROWS, File, FileShards
from icce_ray.images.job import list_bucket
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import run_here
from icce_ray.store import Claim, Folder, s3
from icce_ray.store.run_records import find_artifacts


class StubBucket:
    """Answers like boto3's client, in pages of ten keys."""

    def __init__(self, keys: list[str], page_s: float = 0.0) -> None:
        self.keys = sorted(keys, key=str.encode)
        self.page_s, self.num_pages, self.answered = page_s, 0, Counter[str]()
        self.left = 10**9
        """Pages until the process is killed."""
        self.wanted_at_once, self.pages_now, self.all_asked = 0, 0, threading.Event()
        """After the first pages, none is answered before so many are asked for at the same time."""
        self.lock = threading.Lock()

    def list_objects_v2(self, Prefix: str, Bucket: str, StartAfter: str = "", MaxKeys: int = 10) -> dict[str, Any]:
        with self.lock:
            self.num_pages, self.left = self.num_pages + 1, self.left - 1
            is_killed, is_held = self.left < 0, self.num_pages > bucket_listing.MIN_PAGES and MaxKeys > 1
            self.pages_now += is_held
            if self.pages_now >= self.wanted_at_once:
                self.all_asked.set()
        assert not is_held or self.all_asked.wait(60)
        time.sleep(self.page_s)
        with self.lock:
            self.pages_now -= is_held
        if is_killed:
            raise KeyboardInterrupt
        start = max(bisect.bisect_right(self.keys, StartAfter), bisect.bisect_left(self.keys, Prefix))
        found = [key for key in self.keys[start : start + MaxKeys] if key.startswith(Prefix)]
        is_more = start + MaxKeys < len(self.keys) and self.keys[start + MaxKeys].startswith(Prefix)
        if MaxKeys > 1:
            with self.lock:
                self.answered.update(found)
        entries = [{"Key": key, "Size": len(key), "ETag": f'"{key}"'} for key in found]
        return {"Contents": entries, "IsTruncated": is_more, "NextContinuationToken": "x"}


def stub(monkeypatch: pytest.MonkeyPatch, keys: list[str], page_s: float = 0.0) -> StubBucket:
    bucket = StubBucket(keys, page_s)
    monkeypatch.setattr(s3, "client", lambda *_, **__: bucket)
    return bucket


def random_keys(rng: np.random.Generator, kind: str) -> list[str]:
    number = int(rng.integers(1, 3000))
    if kind == "numbered":
        return [f"all/img-{n:08d}.jpg" for n in range(number)]
    if kind == "folders":
        return [f"all/{a}/{b:x}.png" for a, b in zip(rng.integers(0, 9, number), rng.integers(0, 2**40, number), strict=True)]  # fmt: skip  # noqa: E501
    alphabet = np.array(list("/ab0~ä\u65e5\ud7ff\U0001f600 "))
    return sorted({f"all/{''.join(rng.choice(alphabet, rng.integers(1, 6)))}.gif" for _ in range(number)})


def listed(folder: Path) -> tuple[list[str], list[KeyRange]]:
    """The URIs in order, without the sorting and merging of shards, and the ranges."""
    prefix = BucketPrefix("s3://photos/all/", Folder.at(folder), StorageConfig(), take_file)
    with run_here(1):
        records = list_bucket(prefix, ResourcesConfig(), Progress("images", quiet=True))
    records.sort(key=lambda record: record.metrics["keys"][0].encode())
    uris = [uri for record in records for part in record.files for uri in image_files.Shard("", "", 0, None, prefix.folder, part.name).load()["uri"].to_pylist()]  # fmt: skip  # noqa: E501
    return uris, [KeyRange(*record.metrics["keys"]) for record in records]


@pytest.mark.parametrize("kind", ["numbered", "folders", "any"])
@pytest.mark.parametrize("seed", range(3))
def test_ranges_hold_every_key_once_however_they_are_divided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, seed: int
) -> None:
    keys = random_keys(np.random.default_rng(seed), kind)
    monkeypatch.setattr(bucket_listing, "SHARD_KEYS", 50)
    monkeypatch.setattr(bucket_listing, "CALL_S", 0.05)
    stub(monkeypatch, [*keys, "alk/other.png", "a.png"], page_s=0.001)
    uris, ranges = listed(tmp_path)
    hidden = [key for key in keys if "/." in key]
    assert uris == [f"s3://photos/{key}" for key in sorted(set(keys) - set(hidden), key=str.encode)]
    assert missing_ranges(BucketPrefix("s3://photos/all/", Folder.at(tmp_path), StorageConfig(), take_file).finished(0.0)) == []  # fmt: skip  # noqa: E501
    assert all(first.until is not None and first.until <= second.after for first, second in pairwise(ranges))


def test_threads_share_a_large_bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bucket_listing, "CALL_S", 60.0)
    bucket = stub(monkeypatch, [f"all/img-{n:08d}.jpg" for n in range(5000)])
    bucket.wanted_at_once = bucket_listing.NUM_THREADS // 2
    uris, _ = listed(tmp_path)
    assert len(uris) == 5000
    num_ranges = len(prefix_in(tmp_path).finished(0.0)) - 1  # and the record of them all
    assert num_ranges >= bucket.wanted_at_once
    assert sum(bucket.answered.values()) <= 5000 + 10 * (num_ranges - 1)  # a range ends within a page


def test_a_killed_listing_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_bytes = Folder.write_bytes

    def write(*arguments: Any, **options: Any) -> None:
        if bucket.left < 0:
            raise KeyboardInterrupt
        write_bytes(*arguments, **options)

    monkeypatch.setattr(Folder, "write_bytes", write)
    monkeypatch.setattr(bucket_listing, "SHARD_KEYS", 200)
    keys = [f"all/{n:05d}.jpg" for n in range(5000)]
    bucket = stub(monkeypatch, keys, page_s=0.001)
    bucket.left = 450
    with pytest.raises(KeyboardInterrupt):
        listed(tmp_path)
    before, bucket.left = list(bucket.answered), 0
    with pytest.raises(KeyboardInterrupt):
        listed(tmp_path)
    assert not list((tmp_path / "kept").iterdir())
    gaps = [KeyRange(after, until or "~") for after, until in missing_ranges(prefix_in(tmp_path).finished(0.0))]
    lost = [key for key in before if any(after < key.removeprefix("all/") <= until for after, until in gaps)]
    assert len(lost) <= bucket_listing.NUM_THREADS * 10  # a page for each thread
    bucket.left = 10**9
    uris, _ = listed(tmp_path)
    assert uris == [f"s3://photos/{key}" for key in keys]
    assert not list((tmp_path / "kept").iterdir())
    bucket.num_pages = 0
    assert listed(tmp_path)[0] == uris
    assert bucket.num_pages == 0
    monkeypatch.setattr(job, "MAX_AGE_S", 0.0)
    assert listed(tmp_path)[0] == uris
    assert bucket.num_pages >= 500


def test_no_more_tasks_list_at_a_time_than_may_lose_a_page_for_each_thread() -> None:
    items = job._Items(deque(KeyRange(str(n), None) for n in range(99)), 4)
    assert [len(item) for item in items] == [16, 16, 16, 13]
    items.num_running -= 1
    assert [len(item) for item in items] == [10]
    keys_lost = job.NUM_TASKS * bucket_listing.NUM_THREADS * 1000
    assert keys_lost <= SHARD_ROWS


def test_a_bucket_gets_the_same_ids_as_a_plain_loop_over_its_sorted_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    keys = [*random_keys(rng, "any"), "all/x.csv", "all/.hidden/y.png", "all/folder/", "all/t.parquet"]
    monkeypatch.setattr(bucket_listing, "SHARD_KEYS", 50)
    monkeypatch.setattr(image_files, "_holds_images", lambda table, images: False)
    stub(monkeypatch, keys, page_s=0.001)
    config = Config(output=str(tmp_path), num_clusters=2, images={"uri": "s3://photos/all/"})
    monkeypatch.setattr(image_files, "open_uri", lambda uri: (NoDirectory(), "photos/all"))
    with run_here(1):
        _, files = list_images._list(config, Progress("images", quiet=True))
    wanted = sorted((key for key in keys if key.endswith(".gif") and "/." not in key), key=str.encode)
    assert [uri for table in files.tables() for uri in table["uri"].to_pylist()] == [f"s3://photos/{k}" for k in wanted]
    assert files.skipped[".csv"] == files.skipped[".parquet without images"] == 1
    assert files.skipped["hidden"] == 1 + sum("/." in key for key in keys[:-4])


class NoDirectory:
    def get_file_info(self, path: str) -> Any:
        from pyarrow.fs import FileInfo, FileType

        return FileInfo(path, FileType.NotFound)


def test_a_bucket_of_one_page_takes_one_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bucket = stub(monkeypatch, ["all/a.png", "all/b.png"], page_s=0.01)
    prefix = BucketPrefix("s3://photos/all/", Folder.at(tmp_path), StorageConfig(), take_file)
    assert list_ranges([KeyRange("", None)], prefix) == ([], 2)
    assert bucket.num_pages == 1


def test_an_error_of_the_storage_ends_the_listing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bucket = stub(monkeypatch, [f"all/{n:05d}.jpg" for n in range(5000)], page_s=0.001)
    bucket.left = 20
    with pytest.raises(KeyboardInterrupt):
        listed(tmp_path)
    assert bucket.num_pages <= 20 + bucket_listing.NUM_THREADS


def test_file_shards_without_files() -> None:
    assert len(FileShards([], Folder.at("unused"), Counter())) == 0


def prefix_in(folder: Path) -> BucketPrefix:
    return BucketPrefix("s3://photos/all/", Folder.at(folder), StorageConfig(), take_file)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(bucket_listing, "SHARD_KEYS", 50)
    return [f"all/{n:05d}.jpg" for n in range(1000)]


@pytest.mark.parametrize("removed", ["files", "records"])
def test_a_listing_that_lost_shards_lists_them_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keys: list[str], removed: str
) -> None:
    stub(monkeypatch, keys)
    uris, _ = listed(tmp_path)
    lost = sorted(path for path in (tmp_path / removed).iterdir() if path.name != "all.json")[3:9]
    for path in lost:
        path.unlink()
    assert listed(tmp_path)[0] == uris
    assert listed(tmp_path)[0] == uris


def test_a_listing_whose_shards_are_removed_meanwhile_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keys: list[str]
) -> None:
    def list_and_lose(*args: Any) -> Any:
        answer = list_ranges(*args)
        next((tmp_path / "files").iterdir()).unlink()
        return answer

    stub(monkeypatch, keys)
    monkeypatch.setattr(job, "list_ranges", list_and_lose)
    with pytest.raises(WorkerError, match="of 1,000 keys that were listed, 9"):
        listed(tmp_path)
    monkeypatch.setattr(job, "list_ranges", list_ranges)
    assert len(listed(tmp_path)[0]) == 1000


def test_a_range_that_was_listed_twice_counts_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keys: list[str]
) -> None:
    stub(monkeypatch, keys + [key.replace("jpg", "csv") for key in keys])
    list_ranges([KeyRange("00100.jpg", "00303.jpg")], prefix_in(tmp_path))  # by a task whose worker died
    first = True

    def repeated(*args: Any) -> Any:
        nonlocal first
        answer = list_ranges([KeyRange("00250.jpg", "00500.jpg")], prefix_in(tmp_path)) if first else ([], 0)
        first = False
        left, number = list_ranges(*args)
        return [*answer[0], *left], number

    monkeypatch.setattr(job, "list_ranges", repeated)
    uris, ranges = listed(tmp_path)
    assert uris == [f"s3://photos/{key}" for key in keys]
    records = prefix_in(tmp_path).finished(0.0)
    assert sum(record.metrics["others"].get(".csv", 0) for record in records) == 1000
    assert all(first.until is not None and first.until <= second.after for first, second in pairwise(ranges))


def test_an_answer_without_keys_is_not_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = [f"all/{n:05d}.jpg" for n in range(300)]
    bucket = stub(monkeypatch, keys)
    answer = bucket.list_objects_v2

    def in_turn(ContinuationToken: str = "", **asked: Any) -> dict[str, Any]:
        return answer(**asked) if ContinuationToken else {"IsTruncated": True, "NextContinuationToken": "x"}

    monkeypatch.setattr(bucket, "list_objects_v2", in_turn)
    assert listed(tmp_path)[0] == [f"s3://photos/{key}" for key in keys]


def bucket_config(monkeypatch: pytest.MonkeyPatch, output: Path) -> Config:
    monkeypatch.setattr(image_files, "open_uri", lambda uri: (NoDirectory(), "photos/all"))
    return Config(output=str(output), num_clusters=2, images={"uri": "s3://photos/all/"})


def list_files_of(config: Config) -> list[str]:
    with run_here(1):
        _, files = list_images._list(config, Progress("images", quiet=True))
    return [uri for table in files.tables() for uri in table["uri"].to_pylist()]


def test_a_bucket_without_images_is_listed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = bucket_config(monkeypatch, tmp_path)
    stub(monkeypatch, ["all/readme.txt"])
    with pytest.raises(InputError, match="no images in"):
        list_files_of(config)
    stub(monkeypatch, ["all/readme.txt", "all/a.jpg"])
    assert list_files_of(config) == ["s3://photos/all/a.jpg"]


def test_a_refresh_does_not_use_what_a_killed_one_had_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = bucket_config(monkeypatch, tmp_path)
    last = SimpleNamespace(metrics={"digest": "x", "files_digest": "y", "generation": 0})
    monkeypatch.setattr(list_images, "_last_listing", lambda *_: last)
    stub(monkeypatch, ["all/a.jpg"])
    list_files_of(config)
    stub(monkeypatch, ["all/a.jpg", "all/b.jpg"])
    with run_here(1):
        refresh = list_images.find_changes(config, Progress("images", quiet=True))
    assert refresh is not None
    assert len(refresh.files) == 2


def test_gc_and_forget_see_that_a_bucket_is_being_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = bucket_config(monkeypatch, tmp_path)
    bucket = stub(monkeypatch, ["all/a.jpg"])
    answer, claimed = bucket.list_objects_v2, list[str]()

    def during(**asked: Any) -> dict[str, Any]:
        for key in find_artifacts(Folder.at(tmp_path)):
            with pytest.raises(BusyError), Claim(Folder.at(tmp_path) / key):
                pass
            claimed.append(key)
        return answer(**asked)

    monkeypatch.setattr(bucket, "list_objects_v2", during)
    list_files_of(config)
    assert claimed == [f"images/{list_images._key(config)}"]


@pytest.mark.parametrize("key", ["a.tar#0+5/x.png", "deep/a.parquet#3/image.jpg", "A.TAR#1+2/b.tar"])
def test_a_key_that_reads_like_a_place_in_a_container_is_counted_with_the_remedy(key: str) -> None:
    others: Counter[str] = Counter()
    assert take_file(File(f"s3://photos/{key}", 5, "etag"), others, []) is None
    assert describe(others) == "1 x name that reads like a place in a container (rename it)"
    assert take_file(File("s3://photos/a.tar#0/x.png", 5, "etag"), others, []) is not None
