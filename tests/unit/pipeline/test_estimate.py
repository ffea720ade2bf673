from __future__ import annotations

import pytest

from icce_ray.config import build_config
from icce_ray.errors import ConfigError
from icce_ray.pipeline import estimate


def test_the_rate_is_that_after_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers start for 7 s, then embed 8 images per second."""
    times = iter([100.0, 109.0, 110.0, 112.0])
    monkeypatch.setattr(estimate.time, "monotonic", lambda: next(times))
    clock = estimate._Clock(quiet=True)
    for done in (16, 24, 40):
        clock.update(done, 40)
    assert clock.figures() == (7.0, 8.0)


def test_of_a_single_part_only_the_whole_time_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 110.0])
    monkeypatch.setattr(estimate.time, "monotonic", lambda: next(times))
    clock = estimate._Clock(quiet=True)
    clock.update(40, 40)
    assert clock.figures() == (0.0, 4.0)


def test_ready_made_embeddings_need_no_estimate() -> None:
    config = build_config({"embeddings": {"uri": "x.npy"}, "num_clusters": 2, "output": "out"}, "run.yaml")
    with pytest.raises(ConfigError, match=r"embeddings\.uri: these embeddings are ready-made"):
        estimate.estimate(config)
