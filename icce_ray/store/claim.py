"""Claims: only one job at a time writes an artifact. A second job gets an error; a killed job leaves nothing behind.

On local disks a claim is a file lock, which the kernel releases when its holder dies. On S3 it is an object that is
created by a conditional put and renewed by its holder. A claim that is no longer renewed is taken over, by another
conditional put; a holder that was only cut off finds out at its next renewal, and stops. Its workers, and those that a
killed job left, look at the claim before they write a part. Storage that supports neither (gs://) is not guarded.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from icce_ray.errors import BusyError, InputError, WorkerError
from icce_ray.interrupt import interrupt_main_thread
from icce_ray.store import s3
from icce_ray.store.filesystem import Folder

CLAIM_NAME = ".writer.json"
RENEW_S = 5.0
REQUEST_S = 5.0
"""Time limit of a renewal: one request that hangs must not cost the claim."""
LEASE_S = 40.0
"""A claim that is not renewed for this long belongs to a dead job."""
POLL_S = 0.5


class Claim:
    """Held while an artifact is written.

    Usage::

        with Claim(folder) as claim:
            writer = ArtifactWriter(claim.folder)
            ...
            claim.confirm()

    Raises BusyError: on entry, another job is writing the artifact; InputError: on entry, the claim file is a link;
    WorkerError: on exit, another job took the claim over meanwhile. It interrupts the block in the main thread."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._id = folder, uuid.uuid4().hex
        self._own = {"id": self._id, "host": socket.gethostname(), "machine": _machine(), **_process(os.getpid())}
        self._file: IO[str] | None = None  # of a local claim; what follows is of one on S3
        self._renewer: threading.Thread | None = None
        self._renewals, self._etag, self._is_lost = 0, "", False
        self._putting, self._done = threading.Lock(), threading.Event()

    @property
    def folder(self) -> Folder:
        """The folder for writers that lose the right to write with the claim."""
        guarded = self._folder.local_path is not None or self._folder.s3_options is not None
        return replace(self._folder, claim=self._id) if guarded else self._folder

    def __enter__(self) -> Claim:
        if self._folder.local_path is not None:
            self._lock(self._folder.local_path)
        elif self._folder.s3_options is not None:
            s3.patiently(self._folder.uri, self._put_or_take_over)
            is_main = threading.current_thread() is threading.main_thread()
            self._renewer = threading.Thread(target=self._renew, args=(is_main,), daemon=True)
            self._renewer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._renewer is not None:
            self._done.set()
            self._renewer.join()
            if self._is_lost and (kind is None or kind is KeyboardInterrupt):
                raise _lost(self._folder) from None
            with suppress(OSError, InputError, WorkerError):  # a claim that stays is taken over
                if not self._is_lost and self._content() == self._text():
                    self._folder.remove(CLAIM_NAME)

    def confirm(self) -> None:
        """Make sure that the claim still holds, before the last write. Raises WorkerError: another job took it over."""
        if self._renewer is not None and (self._is_lost or not s3.patiently(self._folder.uri, self._put_again)):
            raise _lost(self._folder)

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
        self._file.write(self._text())
        self._file.flush()
        os.fsync(self._file.fileno())  # workers on other machines read it, perhaps through NFS

    def _put_or_take_over(self) -> None:
        if self._put(IfNoneMatch="*"):
            return
        content, etag = self._content(), self._etag
        deadline = time.monotonic() + LEASE_S
        while content and (is_alive := _is_alive(content)) is not False and time.monotonic() < deadline:
            if is_alive or self._etag != etag:  # it is renewed
                raise self._busy(content)
            time.sleep(POLL_S)
            content = self._content()
        if not self._put(**({"IfMatch": self._etag} if content else {"IfNoneMatch": "*"})):
            raise self._busy(self._content())

    def _put(self, **condition: str) -> bool:
        try:
            with self._request() as (client, place):
                answer = client.put_object(**place, Body=self._text().encode(), **condition)
        except (FileExistsError, FileNotFoundError):
            # If the answer to our own put got lost, the retry finds our content.
            return self._content() == self._text()
        self._etag = answer["ETag"]
        return True

    def _content(self) -> str:
        """Content of the present claim, "" if there is none. Stores its etag."""
        try:
            with self._request() as (client, place):
                answer = client.get_object(**place)
                content: str = answer["Body"].read().decode()
        except FileNotFoundError:
            return ""
        self._etag = answer["ETag"]
        return content

    @contextmanager
    def _request(self) -> Iterator[tuple[Any, dict[str, str]]]:
        """A client for one request, and where the claim is."""
        assert self._folder.s3_options is not None
        uri = self._folder.file_uri(CLAIM_NAME)
        bucket, key = s3.split_uri(uri)
        with s3.translated(uri):
            yield (
                s3.client(self._folder.s3_options, read_timeout_s=REQUEST_S, attempts=2),
                {"Bucket": bucket, "Key": key},
            )

    def _text(self) -> str:
        return json.dumps({**self._own, "renewals": self._renewals})

    def _renew(self, interrupts: bool) -> None:
        while not self._done.wait(RENEW_S):
            try:
                self._is_lost = self._is_lost or not self._put_again()
            except (OSError, InputError):
                continue  # the store is away for others, too
            if self._is_lost:
                if interrupts and not self._done.is_set():
                    interrupt_main_thread()
                return

    def _put_again(self) -> bool:
        """Renew the claim; False if it belongs to another job."""
        with self._putting:
            self._renewals += 1
            try:
                return self._put(IfMatch=self._etag)
            except BaseException:
                self._renewals -= 1
                raise

    def _busy(self, content: str) -> BusyError:
        holder = _parse(content)
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another job"
        return BusyError(
            f"{self._folder.uri}: {who} is writing this artifact. Wait for it (the same command then uses its "
            "result), stop it, or choose another output"
        )


def check_claim(folder: Folder) -> None:
    """Before a part is written. Raises WorkerError: the claim that `folder` was given for is lost."""
    if folder.claim is None:
        return
    try:
        content = folder.read_bytes(CLAIM_NAME)
    except FileNotFoundError:
        content = b""
    if folder.claim.encode() not in content:
        raise _lost(folder)


def _lost(folder: Folder) -> WorkerError:
    return WorkerError(
        f"{folder.uri}: another job took this artifact over while this one was stopped or could not reach the storage, "
        "so this one stops. Wait for the other (the same command then uses its result)"
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


def _machine() -> str:
    """Tells machines and containers apart, whose host names may be equal: only here is a process id of ours valid."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return uuid.uuid4().hex


def _is_alive(content: str) -> bool | None:
    """Whether the holder's process lives; None if that cannot be seen from here."""
    holder = _parse(content)
    if holder is None or holder.get("machine") != _machine():
        return None
    return holder["started"] is not None and _process(holder["pid"])["started"] == holder["started"]
