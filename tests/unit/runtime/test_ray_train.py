from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ControllerError, TrainingFailedError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from icce_ray.config import WorkerResources
from icce_ray.errors import InputError, WorkerError
from icce_ray.runtime import ray_train
from icce_ray.runtime.progress import Progress


@pytest.mark.parametrize(("starts", "gpus"), [(True, 0), (False, 0), (True, 1)])
def test_workers_that_do_not_start_are_tried_again_and_then_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, starts: bool, gpus: int
) -> None:
    tried: list[Any] = []

    def fit(trainer: Any) -> None:
        tried.append(trainer["run_config"].failure_config)
        assert trainer["scaling_config"] == {
            "num_workers": 2,
            "use_gpu": gpus > 0,
            "resources_per_worker": {"CPU": 1.0, "GPU": 1} if gpus else {"CPU": 1.0},
        }
        raise TrainingFailedError("x") if starts else ControllerError(WorkerGroupStartupTimeoutError(2))

    remote: Any = SimpleNamespace(options=lambda **options: remote, remote=lambda *given: remote, read=None)
    remote.read = remote
    monkeypatch.setattr(ray_train.ray, "remote", lambda kind: remote)
    monkeypatch.setattr(ray_train, "relayed_progress", lambda *given: nullcontext())
    monkeypatch.setattr(ray_train, "ScalingConfig", lambda **options: options)
    monkeypatch.setattr(ray_train, "TorchTrainer", lambda work, **options: options)
    monkeypatch.setattr(ray_train, "fit_in_thread", fit)
    message = "method: ended 4 times" if starts else "method: its 2 workers could not be started, 10 times: a machine"
    with pytest.raises(WorkerError, match=message) as caught:
        ray_train.train(
            "method",
            print,
            WorkerResources(num_workers=2, cpus_per_worker=1.0, gpus_per_worker=gpus),
            Progress("method", quiet=True),
            "gloo",
        )
    assert "\n" not in str(caught.value)
    assert [each.controller_failure_limit for each in tried] == [9]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_users_mistake_is_what_a_worker_returns(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Raised, it would start all workers again."""
    mistake = InputError("mend this")

    def work(device: str, progress: Progress) -> None:
        assert device == "cpu"
        raise mistake

    context = SimpleNamespace(get_world_rank=lambda: rank)
    monkeypatch.setattr(ray_train.ray.train, "get_context", lambda: context)
    board = SimpleNamespace(post=SimpleNamespace(remote=print))
    assert ray_train._on_worker({"stage": "method", "work": work, "on_gpu": False, "board": board}) is mistake
