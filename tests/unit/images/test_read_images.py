"""Reading from a store that fails, over HTTP: a server that answers as each test says."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray.config import StorageConfig
from icce_ray.errors import InputError, WorkerError
from icce_ray.images import read_images
from icce_ray.images.containers import Span
from icce_ray.images.listing import ListedImage
from icce_ray.store import s3

LISTING = b"<ListBucketResult><Name>photos</Name><KeyCount>0</KeyCount></ListBucketResult>"
ERRORS = {
    code: f"<Error><Code>{name}</Code></Error>".encode()
    for code, name in ((403, "AccessDenied"), (412, "PreconditionFailed"), (500, "InternalError"), (503, "SlowDown"))
}
Answer = Callable[[str], Any]


class Store:
    """`answer` gets the key ("" for a listing) and returns a status, a body, or a handler that writes by itself."""

    def __init__(self) -> None:
        self.answer: Answer = lambda key: LISTING
        self.seen: list[str] = []
        self.ranges: list[tuple[str, str | None]] = []
        """Key and range of each request."""
        self.conditions: list[str | None] = []


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    told = Store()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            key = self.path.partition("?")[0].removeprefix("/photos").removeprefix("/")
            told.seen.append(key)
            told.ranges.append((key, self.headers["Range"]))
            told.conditions.append(self.headers["If-Match"])
            found = told.answer(key)
            if callable(found):
                found(self)
                return
            status, data = (found, ERRORS[found]) if isinstance(found, int) else (200, found)
            if status == 200 and self.headers["Range"]:
                start, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                status, data = 206, data[int(start) : int(last) + 1]
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    s3.use_s3(StorageConfig(endpoint=f"http://127.0.0.1:{server.server_port}", access_key="a", secret_key="b"))
    monkeypatch.setattr(read_images, "READ_TIMEOUTS_S", (60.0,) * 4)  # a busy machine answers late
    monkeypatch.setattr(read_images, "MIN_TRYING_S", 0.0)
    monkeypatch.setattr(read_images, "BACKOFF_S", 0.001)
    monkeypatch.setattr(read_images, "_readable", {})
    yield told
    s3.use_s3(StorageConfig())
    server.shutdown()
    server.server_close()


def read(*keys: str) -> list[bytes | str]:
    rows = [ListedImage(number, f"s3://photos/{key}", None, None) for number, key in enumerate(keys)]
    return [data for _, data in sorted(read_images.read_images(rows))]


def test_a_good_image_is_read_however_long_the_store_is_away(store: Store) -> None:
    store.answer = lambda key: 503 if len(store.seen) < 100 else (b"picture" if key else LISTING)
    assert read("a.png", "b.png", "c.png") == [b"picture"] * 3


def test_an_object_is_given_up_only_if_others_can_be_read_meanwhile(store: Store) -> None:
    store.answer = lambda key: {"": LISTING, "bad.png": 500}.get(key, b"picture")
    assert read("a.png") == [b"picture"]
    assert str(read("bad.png")[0]).startswith("unreadable: AwayError: s3://photos/bad.png: the storage answered")
    # Listings are answered, reads are not: the image is not to blame.
    store.seen.clear()
    store.answer = lambda key: LISTING if not key else (500 if len(store.seen) < 60 else b"picture")
    assert read("bad.png") == [b"picture"]


def test_a_store_that_stays_away_ends_the_job_with_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "OUTAGE_S", 0.1)
    store.answer = lambda key: 503
    with pytest.raises(WorkerError, match=r"storage has been away for .*run the same command again when s3://photos"):
        read("a.png", "b.png")


def test_credentials_that_are_refused_later_on_are_the_message(store: Store) -> None:
    store.answer = lambda key: 403
    with pytest.raises(InputError, match=r"access to s3://photos was refused .*check the credentials"):
        read("a.png")
    store.answer = lambda key: 403 if key else LISTING  # only this object is forbidden
    assert str(read("a.png")[0]).startswith("unreadable: access to s3://photos was refused")


def test_neighbours_in_a_shard_are_read_together_and_each_byte_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_images, "MAX_RANGE_BYTES", 100)
    monkeypatch.setattr(read_images, "MAX_GAP_BYTES", 10)
    shard = bytes(range(256)) * 2
    store.answer = lambda key: {"": LISTING, "a.png": b"file"}.get(key, shard)
    spans = [("0.tar", 0, 30), ("0.tar", 40, 30), ("0.tar", 70, 30), ("0.tar", 100, 1), ("0.tar", 112, 9)]
    spans += [("1.tar", 121, 5), ("1.tar", 126, 400), ("1.tar", 7, 3)]
    rows = [ListedImage(n, Span(f"s3://photos/{key}", at, size).uri("x.png"), size, None) for n, (key, at, size) in enumerate(spans)]  # fmt: skip  # noqa: E501
    rows.insert(1, ListedImage(100, "s3://photos/0.tar#30+10/(damaged)", 10, None, "damaged shard: bad header"))
    rows.append(ListedImage(101, "s3://photos/a.png", 4, None))
    found = {row.image_id: data for row, data in read_images.read_images(rows)}
    assert found.pop(100) == "damaged shard: bad header"
    assert found.pop(101) == b"file"
    assert [found[number] for number in range(6)] == [shard[at : at + size] for _, at, size in spans[:6]]
    assert str(found[6]).startswith("unreadable: ")  # its shard ends before it
    assert found[7] == shard[7:10]
    # Up to the damage, up to 100 bytes, behind the gap; and perhaps one byte, to see whether the store answers while
    # the second shard cannot be read.
    asked = sorted(span or "all" for key, span in store.ranges if key == "0.tar")
    assert [span for span in asked if span != "bytes=0-0"] == ["bytes=0-29", "bytes=112-120", "bytes=40-100"]
    store.seen.clear()
    assert read_images.read_image(rows[0].uri, 30) == shard[:30]
    assert store.seen == ["0.tar"]


@pytest.mark.parametrize("has_neighbours", [False, True])
def test_an_empty_member_of_a_shard_has_no_bytes_with_or_without_neighbours(store: Store, has_neighbours: bool) -> None:
    store.answer = lambda key: b"abcdefgh" if key else LISTING
    spans = [("0.tar", 0, 3), ("0.tar", 3, 0), ("0.tar", 4, 2)] if has_neighbours else [("0.tar", 3, 0)]
    rows = [ListedImage(start, Span(f"s3://photos/{tar}", start, num).uri("x.png"), num, None) for tar, start, num in spans]  # fmt: skip  # noqa: E501
    assert {row.image_id: data for row, data in read_images.read_images(rows)}[3] == b""
    assert len(store.seen) == has_neighbours


def test_an_object_of_unknown_size_is_not_read_beyond_the_limit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_images, "MAX_FILE_BYTES", 10)
    store.answer = lambda key: b"x" * 11 if key else LISTING
    assert read("a.png") == ["unreadable: ValueError: over the limit of 10 bytes"]
    assert store.seen == ["a.png"]


def test_a_trickle_is_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte comes whenever the reader looks at the clock, and takes a second of it: no single wait is too long."""
    next_byte: list[threading.Semaphore] = []
    seconds = itertools.count()

    def look() -> int:
        next_byte[-1].release()
        return next(seconds)

    def trickle(handler: BaseHTTPRequestHandler) -> None:
        own = threading.Semaphore(0)
        next_byte.append(own)
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        with suppress(OSError):
            for _ in range(1000):
                assert own.acquire(timeout=60)
                handler.wfile.write(b"x")

    monkeypatch.setattr(s3, "time", SimpleNamespace(monotonic=look))
    store.answer = lambda key: trickle if key else LISTING
    assert read("a.png") == ["unreadable: AwayError: s3://photos/a.png: only 121 of 1000 bytes arrived in 121 s"]
    assert len(next_byte) == 4
    for own in next_byte:
        own.release(1000)


@pytest.mark.parametrize(("sent", "asked"), [(10, (2, 3)), (5, (0, None))], ids=["range is ignored", "broken off"])
def test_other_bytes_than_were_asked_for_are_not_taken(store: Store, sent: int, asked: tuple[int, int | None]) -> None:
    def ten_bytes(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "10")
        handler.end_headers()
        handler.wfile.write(b"0123456789"[:sent])

    store.answer = lambda key: ten_bytes
    with pytest.raises(s3.AwayError), s3.translated("s3://photos/a.png"):
        s3.get_once("s3://photos/a.png", s3.client(s3.current_options(), attempts=1), *asked)


def test_results_are_read_and_written_when_the_store_is_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "OUTAGE_POLL_S", 0.01)
    monkeypatch.setattr(s3, "client", partial(s3.client, attempts=1))
    store.answer = lambda key: 503 if len(store.seen) < 20 else b"content"
    assert s3.get_object("s3://photos/manifest.json", s3.current_options()) == b"content"
    assert len(store.seen) >= 20


def test_an_image_of_a_container_that_changed_since_it_was_listed_is_a_row(store: Store) -> None:
    store.answer = lambda key: 412 if store.conditions[-1] == '"old"' else b"picture"
    place = "s3://photos/0.tar#0+7/x.png"
    assert read_images.read_image(place, 7, "old") == read_images.CHANGED
    assert read_images.read_image(place, 7, "new") == b"picture"
    assert read_images.read_image("s3://photos/x.png", 7, "old") == b"picture", "a file of its own is what it is"


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_an_image_of_a_local_container_that_changed_is_a_row(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"0.{kind}"
    if kind == "tar":
        path.write_bytes(b"picture")
        place = Span(str(path), 0, 7).uri("x.png")
    else:
        pq.write_table(pa.table({"image": [b"picture"]}), path)
        place = f"{path}#0/image"
    etag = str(path.stat().st_mtime_ns)
    assert read_images.read_image(place, 7, etag) == b"picture"
    os.utime(path, ns=(0, 0))
    assert read_images.read_image(place, 7, etag) == "changed since it was listed; run again with --refresh"
