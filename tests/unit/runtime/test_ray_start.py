from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from icce_ray.errors import ResourceError
from icce_ray.runtime import ray_cluster


@pytest.mark.parametrize("num_failures", [0, 1, 2])
def test_ray_that_does_not_start_in_time_is_started_again_and_then_refused(
    monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    said: list[str] = []

    def init(**options: object) -> None:
        said.append("init")
        if said.count("init") <= num_failures:
            raise Exception("The current node timed out during startup. This could happen because ...")

    fake = SimpleNamespace(init=init, shutdown=lambda: said.append("shutdown"))
    monkeypatch.setitem(sys.modules, "ray", fake)
    if num_failures == 2:
        with pytest.raises(ResourceError, match=r"Ray did not start in time: .*set resources\.num_cpus"):
            ray_cluster._init({"address": "local"})
    else:
        ray_cluster._init({"address": "local"})
    assert said == ["init", "shutdown"] * min(num_failures, 2) + ["init"] * (num_failures < 2)


def test_other_errors_of_ray_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    with pytest.raises(ConnectionError, match="nobody there"):
        ray_cluster._init({"address": "10.0.0.1:6379"})
