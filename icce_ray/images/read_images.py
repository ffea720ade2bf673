"""Read the bytes of images, wherever they lie, with time limits and retries; or say why they cannot be read.

The bytes are checked against the size in the listing, so a truncated answer is requested again.
"""

import os
import random
import stat
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from icce_ray.errors import InputError, WorkerError, one_line
from icce_ray.images.containers import Cell, Span, file_of, locate, read_cell
from icce_ray.images.listing import ListedImage
from icce_ray.images.uris import is_remote, local_path, resolve
from icce_ray.store import s3
from icce_ray.store.filesystem import check_store, open_uri
from icce_ray.store.patient_filesystem import BadObjectError
from icce_ray.store.tries import Tries

READ_TIMEOUTS_S = (1.5, 3.0, 6.0, 6.0, 12.0, 12.0, 24.0, 24.0)
"""Longest wait for a byte, by attempt."""
MIN_TRYING_S = 15.0
"""An object is given up after this time and after as many attempts, if its store answered meanwhile."""
BACKOFF_S = 0.1
MAX_BACKOFF_S = 1.0
"""The backoff doubles up to this. A store that throttles slows down one of NUM_THREADS reads, not the job."""
NUM_THREADS = 16
"""Concurrent reads in one process, to hide the latency of remote storage."""
MAX_FILE_BYTES = 2**30
"""An uncompressed image of 100 million pixels takes 400 MB."""
MAX_AHEAD = 32
"""Requests whose images are not handed on yet."""
MAX_AHEAD_BYTES = 2**27
"""Their bytes, unless it is a single image."""
MAX_RANGE_BYTES = 2**23
"""Images of a tar are read in ranges of up to this size."""
MAX_GAP_BYTES = 2**17
"""Bytes between two images that are read along with them: this takes less time than another request."""


CHANGED = "changed since it was listed; run again with --refresh"


class NoImageError(Exception):
    """The place is there, but holds no image; reading it again would not help."""


def read_image(uri: str, size_bytes: int | None = None, etag: str | None = None) -> bytes | str:
    """The bytes of an image, or why they cannot be read: ``missing``, ``unreadable: ...``. The arguments are those of
    the listing; where a container is in another state, the place may hold another image.

    While the store is away, this waits for it. An object is given up only if its store answers meanwhile. Raises
    InputError: the bucket does not exist, or refuses the credentials; WorkerError: the store is away for too long."""
    if size_bytes is not None and size_bytes > MAX_FILE_BYTES:
        return f"unreadable: over the limit of {MAX_FILE_BYTES} bytes"
    if size_bytes == 0 and isinstance(locate(uri), Span):
        return b""  # a range of no bytes cannot be asked for
    tries = Tries()
    while True:
        is_lasting = True
        try:
            data = _read_once(uri, READ_TIMEOUTS_S[min(tries.number, len(READ_TIMEOUTS_S) - 1)], etag)
            if size_bytes is None or len(data) == size_bytes or not is_remote(uri):
                if s3.is_s3(uri):
                    _readable[f"s3://{s3.split_uri(uri)[0]}"] = file_of(uri)
                return data
            problem = f"unreadable: {len(data)} bytes came of {size_bytes}"
        except FileNotFoundError:
            return "missing"
        except FileExistsError:  # the answer to a condition
            return CHANGED
        except NoImageError as error:
            return str(error)
        except InputError as error:
            # A single object may be forbidden. If the whole bucket is, no image can be read and the job must say so.
            if s3.is_s3(uri):
                check_store(uri, s3.current_options(), "images.uri")
            elif is_remote(uri):  # other file systems have looked already
                raise
            return f"unreadable: {error}"
        except WorkerError:
            raise
        except Exception as error:
            problem = f"unreadable: {one_line(error)}"
            if not is_remote(uri) or isinstance(error, (ValueError, BadObjectError)):  # too large, say
                return problem
            is_lasting = False
        store_answers = is_lasting or not s3.is_s3(uri) or _store_answers(uri)
        seconds = tries.add(uri, problem, store_answers=store_answers)
        if tries.number >= len(READ_TIMEOUTS_S) and (is_lasting or seconds > MIN_TRYING_S):
            return problem
        time.sleep(random.uniform(0.5, 1.0) * min(MAX_BACKOFF_S, BACKOFF_S * 2**tries.number))


def read_images(rows: Sequence[ListedImage]) -> Iterator[tuple[ListedImage, bytes | str]]:
    """The bytes of each image, or its problem. Threads read remote images and yield them as they arrive, so that a slow
    answer does not hold up the others. Neighbours in a remote tar are read together."""
    if not any(is_remote(row.uri) for row in rows):
        yield from ((row, _read_together([row])[0]) for row in rows)
        return
    waiting = deque(_requests(rows))
    running: dict[Future[list[bytes | str]], list[ListedImage]] = {}
    threads = ThreadPoolExecutor(NUM_THREADS)
    try:
        while waiting or running:
            ahead = sum(map(_num_bytes, running.values()))
            while waiting and len(running) < MAX_AHEAD:
                ahead += _num_bytes(waiting[0])
                if running and ahead > MAX_AHEAD_BYTES:
                    break
                request = waiting.popleft()
                running[threads.submit(_read_together, request)] = request
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for result in done:
                yield from zip(running.pop(result), result.result(), strict=True)
    finally:
        threads.shutdown(cancel_futures=True)


def _requests(rows: Sequence[ListedImage]) -> Iterator[list[ListedImage]]:
    """The rows in their order; those that lie next to each other in a remote tar together."""
    request: list[ListedImage] = []
    first = last = None
    for row in rows:
        span = None if row.problem or not is_remote(row.uri) else locate(row.uri)
        span = span if isinstance(span, Span) else None
        if (
            first is not None
            and last is not None
            and span is not None
            and span.file == first.file
            and 0 <= span.start - last.end <= MAX_GAP_BYTES
            and span.end - first.start <= MAX_RANGE_BYTES
        ):
            request.append(row)
        else:
            if request:
                yield request
            request, first = [row], span
        last = span
    if request:
        yield request


def _num_bytes(request: list[ListedImage]) -> int:
    return sum(row.size_bytes or 0 for row in request)


def _read_together(request: list[ListedImage]) -> list[bytes | str]:
    """The images of a request. If their range cannot be read, each is tried alone: part of it may be gone."""
    if len(request) > 1:
        spans = [span for row in request if isinstance(span := locate(row.uri), Span)]
        whole = Span(spans[0].file, spans[0].start, spans[-1].end - spans[0].start)
        data = read_image(whole.uri(), whole.num_bytes, request[0].etag)
        if isinstance(data, bytes):
            return [data[span.start - whole.start : span.end - whole.start] for span in spans]
    return [row.problem or read_image(row.uri, row.size_bytes, row.etag) for row in request]


def _read_once(uri: str, timeout_s: float, etag: str | None = None) -> bytes:
    place = locate(uri)
    if place is not None and etag and not is_remote(uri) and str(os.stat(local_path(place.file)).st_mtime_ns) != etag:
        raise NoImageError(CHANGED)
    if isinstance(place, Cell):
        value = read_cell(place)
        if isinstance(value, bytes):
            return value
        if value is None:
            raise NoImageError("null: the row has no image")
        file = resolve(value, file_of(uri).rpartition("/")[0])
        if locate(file) is not None:
            raise NoImageError("unreadable: the row's path leads to a row of a container")
        return _read_once(file, timeout_s)
    file, start, num_bytes = (uri, 0, None) if place is None else place
    if not is_remote(file):
        # A named pipe is opened without waiting for its other end.
        with open(local_path(file), "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a file")
            if (status.st_size if num_bytes is None else num_bytes) > MAX_FILE_BYTES:
                raise ValueError(f"over the limit of {MAX_FILE_BYTES} bytes")
            opened.seek(start)
            return opened.read(num_bytes)
    if s3.is_s3(file):
        client = s3.client(s3.current_options(), read_timeout_s=timeout_s, attempts=1)
        etag, slow_s = None if place is None else etag, 2 * timeout_s
        with s3.translated(file):
            return s3.get_once(file, client, start, num_bytes, max_slow_s=slow_s, max_bytes=MAX_FILE_BYTES, etag=etag)
    try:
        filesystem, path = open_uri(file)
    except InputError as error:
        raise NoImageError(f"unreadable: {error}") from None
    data: bytes = filesystem.handler.read(path, start, num_bytes, max_bytes=MAX_FILE_BYTES)
    return data


def _store_answers(uri: str) -> bool:
    """Whether the store of `uri` answers, judged by another object that could be read before."""
    bucket = f"s3://{s3.split_uri(uri)[0]}"
    readable = _readable.get(bucket, bucket)
    return s3.answers(bucket if readable == file_of(uri) else readable, s3.current_options())


_readable: dict[str, str] = {}
"""The object that was read last, by bucket."""
