"""Threads that each compute on one core, so that results don't depend on their number."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
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
    """Runs functions on `num_threads` threads, one of which is the calling thread: a single item wakes no other. Within
    each, FAISS and torch use that thread only. With 0, functions run in the calling thread, and use as many as they are
    set to."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._executor = ThreadPoolExecutor(num_threads - 1, initializer=_use_one_thread) if num_threads > 1 else None
        self._entered = ExitStack()

    def __enter__(self) -> ThreadPool:
        """Until the end, the calling thread uses one thread between calls, too: a change ends OpenMP's threads."""
        if self.num_threads:
            self._entered.enter_context(_one_thread())
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()
        if self._executor is not None:
            self._executor.shutdown()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results in the order of `items`. If several raise an exception, it is that of the first, for any number of
        threads."""
        if not self.num_threads:
            return [function(item) for item in items]
        todo = list(items)
        results: dict[int, R] = {}
        errors: dict[int, BaseException] = {}
        numbers = iter(range(len(todo)))  # next() of it is atomic

        def work() -> None:
            for number in numbers:
                try:
                    results[number] = function(todo[number])
                except BaseException as error:
                    errors[number] = error
                    return

        helpers = min(self.num_threads, len(todo)) - 1
        started = [self._executor.submit(work) for _ in range(helpers)] if self._executor is not None else []
        try:
            with _one_thread():
                work()
        finally:
            # One that has not begun has nothing left to do.
            running = [helper for helper in started if not helper.cancel()]
            wait(running)
        for helper in running:
            helper.result()
        if errors:
            raise errors[min(errors)]
        return [results[number] for number in range(len(todo))]

    def call(self, function: Callable[[], R]) -> R:
        return self.map(lambda _: function(), [None])[0]


def in_threads(function: Callable[[T], R], items: Sequence[T], num_threads: int) -> list[R]:
    """Results in the order of `items`. A single thread, or a single item, runs in the calling thread."""
    num_threads = min(num_threads, len(items))
    with ThreadPool(num_threads if num_threads > 1 else 0) as pool:
        return pool.map(function, items)


def prefetched(items: Iterable[T]) -> Iterator[T]:
    """The items, each computed in a thread while the one before it is used."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="batch", initializer=_use_one_thread) as thread:
        upcoming = thread.submit(next, iterator, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, iterator, None)
            yield item


def set_threads(num_threads: int) -> None:
    """Set the number of threads of FAISS in this process. It doesn't reliably follow Ray's OMP_NUM_THREADS."""
    import faiss

    faiss.omp_set_num_threads(num_threads)


def threads_within(bytes_each: int) -> int:
    """Number of threads that may run where each needs `bytes_each`: at most FAISS's, within MAX_BYTES together."""
    import faiss

    return max(1, min(faiss.omp_get_max_threads(), MAX_BYTES // bytes_each))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within it, FAISS and torch use one thread in the calling thread."""
    before = [(set_number, get_number()) for get_number, set_number in _libraries()]
    _use_one_thread()
    try:
        yield
    finally:
        for set_number, number in before:
            set_number(number)


def _use_one_thread() -> None:
    for get_number, set_number in _libraries():
        get_number()  # the first one in a thread takes over what any other thread has set
        set_number(1)


def _libraries() -> list[tuple[Callable[[], int], Callable[[int], None]]]:
    """Get and set the number of threads, which both libraries keep per thread. Neither is imported here: what a pool's
    functions don't use takes no time."""
    found: list[tuple[Callable[[], int], Callable[[int], None]]] = []
    if "faiss" in sys.modules:
        import faiss

        found.append((faiss.omp_get_max_threads, faiss.omp_set_num_threads))
    if "torch" in sys.modules:
        import torch

        found.append((torch.get_num_threads, torch.set_num_threads))
    return found
