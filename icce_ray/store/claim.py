"""Claims: only one job at a time writes an artifact. A second job gets an error; a killed job leaves nothing behind.

On local disks a claim is a file lock, which the kernel releases when its holder dies. On S3 it is an object that is
created by a conditional put and renewed by its holder. A claim that is no longer renewed is taken over, by another
conditional put. Storage that supports neither (gs://) is not guarded.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from icce_ray.errors import BusyError, InputError
from icce_ray.store import s3
from icce_ray.store.filesystem import Folder

CLAIM_NAME = ".writer.json"
RENEW_S = 5.0
LEASE_S = 20.0
"""A claim that is not renewed for this long belongs to a dead job."""
POLL_S = 0.5


class Claim:
    """Held while an artifact is written.

    Usage::

        with Claim(folder):
            ...

    Raises:
        BusyError: on entry, if another job is writing the artifact.
        InputError: on entry, if the claim file is a link.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._file: IO[str] | None = None
        self._me = json.dumps({"id": uuid.uuid4().hex, "host": socket.gethostname(), **_process(os.getpid())})
        self._renewals = 0
        self._etag = ""
        self._done = threading.Event()
        self._renewer: threading.Thread | None = None

    def __enter__(self) -> Claim:
        if self._folder.local_path is not None:
            self._lock(self._folder.local_path)
        elif self._folder.s3_options is not None:
            self._put_or_take_over()
            self._renewer = threading.Thread(target=self._renew, daemon=True)
            self._renewer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._renewer is not None:
            self._done.set()
            self._renewer.join()
            if self._content() == self._text():
                self._folder.remove(CLAIM_NAME)

    def _lock(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # A link would let the claim overwrite whatever it points to.
            descriptor = os.open(folder / CLAIM_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise InputError(f"{folder / CLAIM_NAME} is a link; remove it") from None
        self._file = os.fdopen(descriptor, "r+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read()
            self._file.close()
            raise self._busy(holder) from None
        self._file.truncate(0)
        self._file.write(self._me)
        self._file.flush()

    def _put_or_take_over(self) -> None:
        if self._put(IfNoneMatch="*"):
            return
        content, etag = self._content(), self._etag
        deadline = time.monotonic() + LEASE_S
        while content and not _is_dead(content) and time.monotonic() < deadline:
            if _lives_here(content) or self._etag != etag:  # it is renewed
                raise self._busy(content)
            time.sleep(POLL_S)
            content = self._content()
        if not self._put(**({"IfMatch": self._etag} if content else {"IfNoneMatch": "*"})):
            raise self._busy(self._content())

    def _put(self, **condition: str) -> bool:
        assert self._folder.s3_options is not None
        uri = self._folder.file_uri(CLAIM_NAME)
        bucket, key = s3.split_uri(uri)
        try:
            with s3.translated(uri):
                client = s3.client(self._folder.s3_options)
                answer = client.put_object(Bucket=bucket, Key=key, Body=self._text().encode(), **condition)
        except (FileExistsError, FileNotFoundError):
            # If the answer to our own put got lost, the retry finds our content.
            return self._content() == self._text()
        self._etag = answer["ETag"]
        return True

    def _content(self) -> str:
        """Content of the present claim, "" if there is none. Stores its etag."""
        assert self._folder.s3_options is not None
        uri = self._folder.file_uri(CLAIM_NAME)
        bucket, key = s3.split_uri(uri)
        try:
            with s3.translated(uri):
                answer = s3.client(self._folder.s3_options).get_object(Bucket=bucket, Key=key)
                content: str = answer["Body"].read().decode()
        except FileNotFoundError:
            return ""
        self._etag = answer["ETag"]
        return content

    def _text(self) -> str:
        return json.dumps({**json.loads(self._me), "renewals": self._renewals})

    def _renew(self) -> None:
        while not self._done.wait(RENEW_S):
            self._renewals += 1
            try:
                if not self._put(IfMatch=self._etag):
                    return  # taken over; the conditional put of the manifest decides who finishes
            except (OSError, InputError):
                self._renewals -= 1

    def _busy(self, content: str) -> BusyError:
        holder = _parse(content)
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another job"
        return BusyError(
            f"{self._folder.uri}: {who} is writing this artifact. Wait for it (the same command then uses its "
            "result), stop it, or choose another output"
        )


def _process(pid: int) -> dict[str, Any]:
    """A process; its start time distinguishes it from a later process with the same id."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = None
    return {"pid": pid, "started": started}


def _parse(content: str) -> dict[str, Any] | None:
    try:
        holder: dict[str, Any] = json.loads(content)
        return holder if {"host", "pid", "started"} <= holder.keys() else None
    except (ValueError, AttributeError):
        return None


def _lives_here(content: str) -> bool:
    holder = _parse(content)
    return (
        holder is not None
        and holder["host"] == socket.gethostname()
        and holder["started"] is not None
        and _process(holder["pid"])["started"] == holder["started"]
    )


def _is_dead(content: str) -> bool:
    holder = _parse(content)
    return holder is not None and holder["host"] == socket.gethostname() and not _lives_here(content)
