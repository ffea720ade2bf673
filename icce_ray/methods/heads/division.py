"""How the heads are divided: into blocks that are computed together, and the blocks over workers.

The blocks depend on the number of heads alone. A head is therefore computed in the same products, and gives the same
bits, whatever the number of workers and threads.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from icce_ray.errors import ResourceError

MAX_HEADS_PER_GPU_BLOCK = 4
"""A GPU needs several heads at a time to be busy; the arrays of four still fit into its cache at 1,000 clusters."""


@dataclass(frozen=True)
class HeadDivision:
    """The blocks of heads of each worker, contiguous and in order."""

    blocks: tuple[tuple[range, ...], ...]

    @classmethod
    def of(cls, num_heads: int, num_workers: int, *, on_gpu: bool) -> HeadDivision:
        """Divide the heads as evenly as whole blocks allow. Raises ResourceError: there are more workers than
        blocks."""
        blocks = head_blocks(num_heads, on_gpu=on_gpu)
        if num_workers > len(blocks):
            reason = f", in blocks of up to {MAX_HEADS_PER_GPU_BLOCK} on a GPU" if on_gpu else ""
            raise ResourceError(
                f"resources: {num_workers} workers for {num_heads} heads; workers divide the heads{reason}, so at most "
                f"{len(blocks)} can work. Lower num_workers or raise heads.num_heads"
            )
        bounds = [worker * len(blocks) // num_workers for worker in range(num_workers + 1)]
        return cls(tuple(tuple(blocks[a:b]) for a, b in itertools.pairwise(bounds)))

    @property
    def num_heads(self) -> list[int]:
        """Number of heads of each worker."""
        return [len(self.heads(worker)) for worker in range(len(self.blocks))]

    def heads(self, worker: int) -> range:
        """The heads of one worker."""
        return range(self.blocks[worker][0].start, self.blocks[worker][-1].stop)


def head_blocks(num_heads: int, *, on_gpu: bool) -> list[range]:
    """Heads that are computed together.

    On a CPU a block is one head: its activations stay in a core's cache, and every core works on a head of its own. On
    a GPU it is a few heads. The number of blocks is a power of two, so that 2, 4, 8 ... GPUs get equal shares.
    """
    num_blocks = 1 if on_gpu else num_heads
    while num_blocks * MAX_HEADS_PER_GPU_BLOCK < num_heads:
        num_blocks *= 2
    bounds = [block * num_heads // num_blocks for block in range(num_blocks + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]
