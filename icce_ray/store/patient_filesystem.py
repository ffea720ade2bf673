"""A remote file system of pyarrow whose calls have time limits, and wait while the store is away, at most OUTAGE_S.

A call that fails although the store answers is tried MAX_ATTEMPTS times; then its object is to blame.
"""

import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from tempfile import SpooledTemporaryFile
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from icce_ray.errors import InputError, one_line
from icce_ray.store import s3
from icce_ray.store.tries import Tries

MAX_ATTEMPTS = 4
MIN_TRYING_S = 15.0
"""An object is given up after this time and after as many attempts."""
CHECK_S = 15.0
UPLOAD_BYTES = 2**23
SPOOL_BYTES = 2**26
"""Larger uploads wait on the local disk."""
REFUSALS = ("ACCESS_DENIED", "PERMISSION_DENIED", "UNAUTHENTICATED", "AuthorizationFailure", "AuthenticationFailed")
"""Words in the messages of Amazon's, Google's and Microsoft's clients."""
ANSWERS = (
    FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, NotImplementedError, TypeError,
    ValueError,
)  # fmt: skip
"""Errors that no outage causes."""

T = TypeVar("T")


class BadObjectError(OSError):
    """The store answers, but not for this object."""


class RefusedError(BadObjectError):
    """The store refuses access to this object alone."""


def within(seconds: float | None, call: Callable[[], T]) -> T:
    """`call()` in a thread, which is left alone if it takes longer. Raises AwayError: it has not returned in time."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="icce_ray-call", daemon=True).start()
    try:
        return future.result(seconds)
    except FutureTimeoutError:
        if future.done():  # the call's own error
            raise
        raise s3.AwayError(f"no answer in {seconds:.0f} s") from None


class PatientFileSystem(pafs.FileSystemHandler):
    """The file system `inner` with calls that wait. It can be pickled. `store` is what it opens, for messages:
    ``gs://bucket``; `root` is its path, which is asked for to see whether the store answers."""

    def __init__(self, inner: pafs.FileSystem, store: str, root: str) -> None:
        self.inner, self.store, self.root = inner, store, root
        self.readable = root  # the object that was read last

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PatientFileSystem) and bool(self.inner.equals(other.inner))

    def __reduce__(self) -> Any:
        return PatientFileSystem, (self.inner, self.store, self.root)

    def check(self, path: str) -> None:
        """Fail within seconds if the store does not answer for `path`, or refuses access. Raises InputError: the
        reason."""
        try:
            within(CHECK_S, lambda: self.inner.get_file_info(path))
        except (FileNotFoundError, NotADirectoryError):
            return
        except Exception as error:
            raise self._refused(error) or InputError(f"{self.store} cannot be reached: {one_line(error)}") from None

    def answers(self, bad: str = "") -> bool:
        """Whether the store answers now, whatever it answers, for the object that was read last if it isn't `bad`."""
        path = self.root if self.readable == bad else self.readable
        try:
            within(s3.CONNECT_TIMEOUT_S, lambda: self.inner.get_file_info(path))
        except Exception as error:
            return isinstance(error, ANSWERS) or self._refused(error) is not None
        return True

    def call(self, path: str, call: Callable[[], T], num_bytes: int = 0) -> T:
        """`call()`, again and again while the store is away. The time limit grows with the bytes that it transfers.
        Raises InputError: access to the store is refused; BadObjectError: access to the object at `path` is refused, or
        the call failed MAX_ATTEMPTS times although the store answers; WorkerError: the store has been away for
        OUTAGE_S."""
        tries = Tries()
        while True:
            try:
                return within(s3.READ_TIMEOUT_S + num_bytes / s3.MIN_BYTES_PER_S, call)
            except ANSWERS:
                raise
            except Exception as error:
                if (refused := self._refused(error)) is not None:
                    self.check(path.rpartition("/")[0] if self.readable == self.root else self.readable)
                    raise RefusedError(f"{path}: {refused}") from None
                problem = one_line(error)
            seconds = tries.add(self.store, problem, store_answers=self.answers(path))
            if tries.number >= MAX_ATTEMPTS and seconds > MIN_TRYING_S:
                raise BadObjectError(f"{path}: {problem}")
            time.sleep(s3.OUTAGE_POLL_S)

    def read(self, path: str, start: int = 0, num_bytes: int | None = None, max_bytes: int | None = None) -> bytes:
        """Content of a file, or `num_bytes` of it from `start` on. Raises ValueError: it has over `max_bytes`."""
        with self.open_input_file(path) as file:
            num_bytes = file.size() - start if num_bytes is None else num_bytes
            if max_bytes is not None and num_bytes > max_bytes:
                raise ValueError(f"over the limit of {max_bytes} bytes")
            return bytes(file.read_at(num_bytes, start))

    def metadata(self, path: str) -> list[tuple[bytes, bytes]]:
        """The store's metadata of a file, such as its ETag."""
        return self.call(path, lambda: sorted((self.inner.open_input_stream(path).metadata() or {}).items()))

    def _refused(self, error: Exception) -> InputError | None:
        if not isinstance(error, PermissionError) and not any(word in str(error) for word in REFUSALS):
            return None
        return InputError(
            f"access to {self.store} was refused; check the credentials in the environment and what they may do "
            f"({one_line(error)})"
        )

    def get_type_name(self) -> str:
        return f"patient+{self.inner.type_name}"

    def normalize_path(self, path: str) -> str:
        return str(self.inner.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return self.call(", ".join(paths[:1]), lambda: self.inner.get_file_info(paths))

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return self.call(selector.base_dir, lambda: self.inner.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self.call(path, lambda: self.inner.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self.call(path, lambda: _unless_missing(self.inner.delete_dir, path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.call(path, lambda: self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise OSError(f"{self.store}: everything there is not removed at once")

    def delete_file(self, path: str) -> None:
        self.call(path, lambda: _unless_missing(self.inner.delete_file, path))

    def move(self, src: str, dest: str) -> None:
        self.call(src, lambda: self.inner.move(src, dest))

    def copy_file(self, src: str, dest: str) -> None:
        (info,) = self.get_file_info([src])
        self.call(src, lambda: self.inner.copy_file(src, dest), info.size or 0)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_Download(self, path), mode="r")

    open_input_stream = open_input_file

    def open_output_stream(self, path: str, metadata: object) -> pa.NativeFile:
        return pa.PythonFile(_Upload(self, path), mode="w")

    def open_append_stream(self, path: str, metadata: object) -> pa.NativeFile:
        raise NotImplementedError


class _Download(io.RawIOBase):
    """A file that is read. After an error it is opened again."""

    def __init__(self, files: PatientFileSystem, path: str) -> None:
        self._files, self._path = files, path
        self._file: Any = None
        self._position = 0
        self._num_bytes: int = files.call(path, lambda: self._opened().size())

    def _opened(self) -> Any:
        if self._file is None:
            self._file = self._files.inner.open_input_file(self._path)
        return self._file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._num_bytes - self._position)
        size, start = left if size < 0 else min(size, left), self._position

        def attempt() -> bytes:
            try:
                data = bytes(self._opened().read_at(size, start))
            except BaseException:
                self._file = None
                raise
            if len(data) != size:
                self._file = None
                raise s3.AwayError(f"{len(data)} of {size} bytes arrived")
            return data

        data = self._files.call(self._path, attempt, size) if size else b""
        self._files.readable = self._path
        self._position += len(data)
        return data


class _Upload(io.RawIOBase):
    """A file that is written when it is closed, so that it can be sent again."""

    def __init__(self, files: PatientFileSystem, path: str) -> None:
        self._files, self._path = files, path
        self._spool: Any = SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115
        self._lock = threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return int(self._spool.write(data))

    def tell(self) -> int:
        return int(self._spool.tell())

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        try:
            self._files.call(self._path, self._send, self._spool.tell())
        except (FileNotFoundError, RefusedError) as error:
            raise InputError(f"{self._files.store}: {self._path} cannot be written: {one_line(error)}") from None

    def _send(self) -> None:
        # An earlier attempt may still be running. It keeps the spool open, since what it leaves unfinished may count.
        with self._files.inner.open_output_stream(self._path) as file:
            position = 0
            while chunk := self._chunk(position):
                file.write(chunk)
                position += len(chunk)

    def _chunk(self, position: int) -> bytes:
        with self._lock:
            self._spool.seek(position)
            return bytes(self._spool.read(UPLOAD_BYTES))


def _unless_missing(remove: Callable[[str], None], path: str) -> None:
    """An attempt whose answer got lost may have removed it."""
    with suppress(FileNotFoundError):
        remove(path)
