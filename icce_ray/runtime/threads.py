"""Threads for the work that numpy does on one: as many as FAISS may use, and as the memory that each needs allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import faiss

MAX_BYTES = 2 * 1024**3

T = TypeVar("T")
R = TypeVar("R")


def set_threads(num_threads: int) -> None:
    """Threads of every later search in this process. Ray's OMP_NUM_THREADS is not reliable for FAISS, so set it."""
    faiss.omp_set_num_threads(num_threads)


def threads_within(bytes_each: int) -> int:
    """How many threads to start where each needs so much memory."""
    return max(1, min(faiss.omp_get_max_threads(), MAX_BYTES // bytes_each))


def in_threads(function: Callable[[T], R], items: Sequence[T], num_threads: int) -> list[R]:
    """Results in the order of `items`. In each of several threads FAISS keeps to that one; with one thread, or one
    item, all is done in the calling one."""
    num_threads = min(num_threads, len(items))
    if num_threads <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(num_threads, "neighbors", initializer=set_threads, initargs=(1,)) as pool:
        return list(pool.map(function, items))
