from __future__ import annotations

import math

from icce_ray.neighbors.search_memory import needed_bytes, shard_bytes


def test_a_machine_needs_the_share_of_its_workers() -> None:
    base = shard_bytes(1_000_000, 1023)
    assert base == 1_000_000 * (1023 * 4 + 8)
    assert needed_bytes(base, 10**9, num_here=2, num_workers=8) == math.ceil(base / 4) + 2 * 10**9
