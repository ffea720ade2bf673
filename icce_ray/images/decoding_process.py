"""Decode images in another process, so that an image that kills its decoder costs only itself.

Not by :mod:`multiprocessing`, whose new processes run the main script of the user again.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from icce_ray.errors import WorkerError
from icce_ray.images.decoding import decode_image
from icce_ray.images.preprocessing import Pixels, Preprocessing, SeveralViews

MAX_ATTEMPTS = 2
"""A process may also die of something else than its image."""
TIMEOUT_S = 120.0
"""Longest time that an image may take. One of 100 million pixels takes about 10 s."""


class DecodingProcess:
    """The process. It starts with the first image, and ends with this object. One thread at a time uses it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._is_closed = False
        self._using = threading.Lock()

    def decode(self, data: bytes, preprocessing: Preprocessing | SeveralViews, *, max_pixels: int) -> Pixels | str:
        """What :func:`decode_image` returns, or KILLER if the process died at it MAX_ATTEMPTS times, or that the image
        took too long. Raises WorkerError: the process cannot be started, or :meth:`close` was called."""
        with self._using:
            for _ in range(MAX_ATTEMPTS):
                connection = self._connection or self._start()
                try:
                    connection.send((data, preprocessing, max_pixels))
                    answer: Pixels | str = _receive(connection)
                    return answer
                except TimeoutError:
                    self._stop()
                    return f"over the limit of {TIMEOUT_S:g} s"
                except (EOFError, OSError):
                    self._stop()
        from icce_ray.store.attempts import KILLER  # not above: the process itself needs only the decoder

        return KILLER

    def close(self) -> None:
        """End the process. Another thread may be waiting for it."""
        self._is_closed = True
        self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> Connection[Any, Any]:
        if self._is_closed:
            raise WorkerError("decode: stopped")
        connection, other_end = Pipe()
        search_path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        with tempfile.TemporaryFile() as messages:
            self._process = subprocess.Popen(
                # -P: otherwise modules in the working folder come first.
                [sys.executable, "-P", "-m", "icce_ray.images.decoding_process", str(other_end.fileno())],
                env=os.environ | {"PYTHONPATH": search_path},
                pass_fds=[other_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
            )
            other_end.close()
            try:
                _receive(connection)
            except (EOFError, OSError):
                self._stop()
                messages.seek(0)
                said = messages.read().decode(errors="replace").split()
                raise WorkerError(f"cannot start a process that decodes images: {' '.join(said)[-500:]}") from None
        self._connection = connection
        return connection

    def _stop(self) -> None:
        self._kill()
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _receive(connection: Connection[Any, Any]) -> Any:
    if not connection.poll(TIMEOUT_S):
        raise TimeoutError
    return connection.recv()


def decode_or_die(data: bytes, preprocessing: Preprocessing | SeveralViews, *, max_pixels: int) -> Pixels | str:
    """:func:`decode_image`, for a process that is started again without the image that took too long."""
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(TIMEOUT_S, exit=True, file=nowhere)
        try:
            return decode_image(data, preprocessing, max_pixels=max_pixels)
        finally:
            faulthandler.cancel_dump_traceback_later()


def main(file_descriptor: int) -> None:
    """Decode what comes until the other process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process decides
    connection: Connection[Any, Any] = Connection(file_descriptor)
    with suppress(EOFError, OSError):
        connection.send("started")
        while True:
            data, preprocessing, max_pixels = connection.recv()
            connection.send(decode_image(data, preprocessing, max_pixels=max_pixels))


if __name__ == "__main__":
    main(int(sys.argv[1]))
