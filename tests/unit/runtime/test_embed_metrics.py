"""What an embedding worker tells Ray, with stand-ins for Ray's metrics."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from icce_ray.runtime import worker_process


class Metric:
    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...] = ()) -> None:
        self.name, self.values, self.tag_keys = name, list[float](), tag_keys
        made[name] = self

    def set_default_tags(self, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.tag_keys

    def inc(self, number: float) -> None:
        assert number > 0  # as Ray does
        self.values.append(number)

    set = inc


made: dict[str, Metric] = {}


def test_parts_are_counted_and_the_busy_share_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    context: Any = SimpleNamespace(get_actor_id=lambda: "a")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get_runtime_context=lambda: context))
    monkeypatch.setitem(sys.modules, "ray.util.metrics", SimpleNamespace(Counter=Metric, Gauge=Metric))
    monkeypatch.setattr(worker_process, "time", SimpleNamespace(monotonic=lambda: now))
    metrics = worker_process.EmbedMetrics()
    metrics.add(512, 3, 1000, busy_s=2.0)
    now += 20.0
    metrics.add(100, 0, 10, busy_s=15.0)
    now += 10.0
    metrics.add(100, 0, 10, busy_s=20.0)
    values = {name.removeprefix("icce_ray_embed_"): metric.values for name, metric in made.items()}
    assert values == {
        "images": [512, 100, 100],
        "errors": [3],
        "read_bytes": [1000, 10, 10],
        "busy_share": [15.0 / 20.0, 5.0 / 10.0],
    }
