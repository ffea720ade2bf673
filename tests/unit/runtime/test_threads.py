from __future__ import annotations

import threading

import faiss
import pytest
import torch

from icce_ray.runtime.threads import MAX_BYTES, ThreadPool, in_threads, prefetched, set_threads, threads_within

TIMEOUT_S = 60.0
"""Far longer than any thread takes: only a test that fails waits so long."""


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_results_come_in_the_order_of_the_items(num_threads: int) -> None:
    with ThreadPool(num_threads) as pool:
        assert pool.map(lambda item: item * 2, range(20)) == list(range(0, 40, 2))
        assert pool.call(lambda: "result") == "result"
    assert in_threads(lambda item: -item, [3, 1, 2], num_threads) == [-3, -1, -2]


def test_each_thread_of_a_pool_computes_on_one_core() -> None:
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    together = threading.Barrier(2)

    def ask(_: int) -> tuple[int, int]:
        together.wait(TIMEOUT_S)  # both threads of the pool are asked
        return torch.get_num_threads(), faiss.omp_get_max_threads()

    try:
        torch.set_num_threads(2)
        set_threads(2)
        assert in_threads(ask, [0, 1], 2) == [(1, 1), (1, 1)]
        assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (2, 2)
        assert ThreadPool(2).map(ask, [0, 1]) == [(1, 1), (1, 1)]
        assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (2, 2)
        with ThreadPool(2):
            assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (1, 1)
        assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (2, 2)
    finally:
        torch.set_num_threads(before[0])
        set_threads(before[1])


@pytest.mark.parametrize(("items", "num_threads"), [([1], 4), ([1, 2, 3], 1), ([], 4)])
def test_a_single_thread_or_item_runs_in_the_calling_thread(items: list[int], num_threads: int) -> None:
    assert set(in_threads(lambda _: threading.get_ident(), items, num_threads)) <= {threading.get_ident()}


@pytest.mark.parametrize("fails_in_caller", [True, False])
def test_an_error_in_a_thread_is_raised(fails_in_caller: bool) -> None:
    together = threading.Barrier(2)

    def fail(_: int) -> None:
        together.wait(TIMEOUT_S)
        if (threading.current_thread() is threading.main_thread()) == fails_in_caller:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_threads(fail, [1, 0], 2)


def test_of_several_errors_that_of_the_first_item_is_raised() -> None:
    second_failed = threading.Event()

    def fail(item: int) -> None:
        if item == 0:
            assert second_failed.wait(TIMEOUT_S)
        else:
            second_failed.set()
        raise ValueError(f"item {item}")

    for _ in range(5):  # either thread may get the first item
        second_failed.clear()
        with pytest.raises(ValueError, match="item 0"):
            in_threads(fail, [0, 1], 2)


def test_the_number_of_threads_is_bounded_by_memory() -> None:
    before = faiss.omp_get_max_threads()
    set_threads(8)
    try:
        assert threads_within(1) == 8
        assert threads_within(MAX_BYTES // 3) == 3
        assert threads_within(2 * MAX_BYTES) == 1
    finally:
        set_threads(before)


def test_the_next_batch_is_made_while_one_is_used_and_errors_come_through() -> None:
    made = [threading.Event() for _ in range(3)]

    def numbers():
        for number, event in enumerate(made):
            event.set()
            yield number
        raise KeyError("the end")

    items = prefetched(numbers())
    assert next(items) == 0
    assert made[1].wait(TIMEOUT_S)
    assert not made[2].is_set()
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(KeyError, match="the end"):
        next(items)
