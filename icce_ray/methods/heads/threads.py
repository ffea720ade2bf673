"""Threads that each compute alone: torch runs on one core in each, so results do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class ThreadPool:
    """Runs functions on `num_threads` threads; with 0, in the calling thread."""

    def __init__(self, num_threads: int) -> None:
        self._executor = None
        if num_threads:
            # Each thread has its own setting, and a new one starts from the process's.
            self._executor = ThreadPoolExecutor(
                num_threads, thread_name_prefix="heads", initializer=torch.set_num_threads, initargs=(1,)
            )

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results in the order of `items`; the first exception is raised."""
        if self._executor is None:
            return [function(item) for item in items]
        return list(self._executor.map(function, items))

    def call(self, function: Callable[[], R]) -> R:
        """The result of one call."""
        return self.map(lambda _: function(), [None])[0]
