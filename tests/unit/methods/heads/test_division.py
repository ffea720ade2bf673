from __future__ import annotations

import pytest

from icce_ray.errors import ResourceError
from icce_ray.methods.heads.division import HeadDivision, head_blocks


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 7])
def test_every_head_is_trained_by_one_worker_and_shares_differ_by_one_head(num_workers: int) -> None:
    division = HeadDivision.of(7, num_workers, on_gpu=False)
    heads = [head for worker in range(num_workers) for head in division.heads(worker)]
    assert heads == list(range(7))
    assert sum(division.num_heads) == 7
    assert max(division.num_heads) - min(division.num_heads) <= 1


@pytest.mark.parametrize(("num_workers", "most"), [(1, 50), (2, 25), (4, 13), (8, 7), (16, 4)])
def test_gpus_share_blocks_of_heads_evenly_and_blocks_do_not_depend_on_their_number(
    num_workers: int, most: int
) -> None:
    division = HeadDivision.of(50, num_workers, on_gpu=True)
    assert [block for blocks in division.blocks for block in blocks] == head_blocks(50, on_gpu=True)
    assert max(division.num_heads) == most


def test_on_a_cpu_every_head_is_computed_alone_and_on_a_gpu_at_most_four_together() -> None:
    assert head_blocks(3, on_gpu=False) == [range(0, 1), range(1, 2), range(2, 3)]
    assert head_blocks(4, on_gpu=True) == [range(4)]
    assert {len(block) for block in head_blocks(50, on_gpu=True)} == {3, 4}


def test_more_workers_than_heads_are_refused_with_the_numbers() -> None:
    with pytest.raises(
        ResourceError, match=r"6 workers for 5 heads; .* at most 5 can work. Lower num_workers or raise"
    ):
        HeadDivision.of(5, 6, on_gpu=False)
    with pytest.raises(ResourceError, match=r"17 workers for 50 heads; .* blocks of up to 4 on a GPU, so at most 16"):
        HeadDivision.of(50, 17, on_gpu=True)
