"""Threads that each compute on one core, so that results don't depend on their number."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar

MAX_BYTES = 2 * 1024**3
"""Memory that the threads of one pool may use together."""

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def repeating(work: Callable[[], None], interval_s: float, name: str) -> Iterator[None]:
    """While the block runs, a thread called `name` calls `work` every `interval_s` seconds."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(interval_s):
            work()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Turns:
    """Lets `num` threads work at a time, or one alone."""

    def __init__(self, num: int) -> None:
        self._num = num
        self._free = threading.Semaphore(num)
        self._alone = threading.Lock()

    @contextmanager
    def taken(self, *, alone: bool) -> Iterator[None]:
        """Wait for a turn. With `alone`, the others have ended theirs before, and begin none until this one ends."""
        num = self._num if alone else 1
        with self._alone if alone else nullcontext():
            for _ in range(num):
                self._free.acquire()
        try:
            yield
        finally:
            self._free.release(num)


class ThreadPool:
    """Runs functions on `num_threads` threads; with 0, in the calling thread. Within each thread, FAISS and torch use
    that thread only; in the calling thread they use as many as they are set to."""

    def __init__(self, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, initializer=_use_one_thread) if num_threads else None

    def __enter__(self) -> ThreadPool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results in the order of `items`; the first exception is raised."""
        if self._executor is None:
            return [function(item) for item in items]
        return list(self._executor.map(function, items))

    def call(self, function: Callable[[], R]) -> R:
        """The result of one call."""
        return self.map(lambda _: function(), [None])[0]


def in_threads(function: Callable[[T], R], items: Sequence[T], num_threads: int) -> list[R]:
    """Results in the order of `items`. A single thread, or a single item, runs in the calling thread."""
    num_threads = min(num_threads, len(items))
    with ThreadPool(num_threads if num_threads > 1 else 0) as pool:
        return pool.map(function, items)


def set_threads(num_threads: int) -> None:
    """Set the number of threads of FAISS in this process. It doesn't reliably follow Ray's OMP_NUM_THREADS."""
    import faiss

    faiss.omp_set_num_threads(num_threads)


def threads_within(bytes_each: int) -> int:
    """Number of threads that may run where each needs `bytes_each`: at most FAISS's, within MAX_BYTES together."""
    import faiss

    return max(1, min(faiss.omp_get_max_threads(), MAX_BYTES // bytes_each))


def _use_one_thread() -> None:
    # Both keep the number per thread. Neither is imported here: what a pool's functions don't use takes no time.
    if "faiss" in sys.modules:
        set_threads(1)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
