"""Sweeps on Ray Tune, without starting it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from icce_ray.config import Config
from icce_ray.errors import WorkerError
from icce_ray.runtime.progress import Progress
from icce_ray.store import Folder
from icce_ray.store.part_records import PartRecords
from icce_ray.sweeps import job, trial
from icce_ray.sweeps.sweep_config import build_sweep
from icce_ray.sweeps.trial import Listings, RunOutcome, key_of


def test_a_searcher_is_told_the_trials_of_an_earlier_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [{"heads.learning_rate": 1e-3}, {"heads.learning_rate": 2e-3}]
    told: list[Any] = []

    class Tuner:
        """Starts two trials, and is then as if killed."""

        def __init__(self, trainable: Any, *, run_config: Any, **others: Any) -> None:
            (self.log,) = run_config.callbacks

        def fit(self) -> list[Any]:
            for number, parameters in enumerate(chosen):
                self.log.on_trial_start(number, [], SimpleNamespace(config=parameters))
            raise KeyboardInterrupt

    monkeypatch.setattr(job, "create_searcher", lambda name, **given: told.append(given["points_to_evaluate"]))
    monkeypatch.setattr(job.tune, "Tuner", Tuner)
    monkeypatch.setattr(job, "available_cpus", lambda: 2)
    base = {"embeddings": {"uri": "x.npy"}, "num_clusters": 5, "output": "out"}
    space = {"heads.learning_rate": {"loguniform": [1e-4, 1e-2]}}
    asked = build_sweep({"base": base, "space": space, "searcher": "optuna"}, "sweep.yaml")
    records, progress = PartRecords(Folder.at(tmp_path), "abc"), Progress("sweep", "trials", quiet=True)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            job.run_trials(asked, None, Listings(), {}, records, progress)
    assert told == [None, chosen]


def test_only_runs_that_are_not_finished_get_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def outcome(run: Config, *_: Any) -> RunOutcome:
        return RunOutcome(run.seed, {"anmi": run.seed / 10}, 5, 1.0, {})

    def start(run: Config, *_: Any) -> RunOutcome:
        started.append(run.seed)
        return outcome(run)

    monkeypatch.setattr(
        job.ray, "remote", lambda function: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))
    )
    monkeypatch.setattr(job.ray, "get", lambda references: references)
    monkeypatch.setattr(trial, "is_finished", lambda run, listings: run.seed in (1, 3))
    monkeypatch.setattr(trial, "run", outcome)
    monkeypatch.setattr(trial, "consensus_nmi", lambda one, other: 1.0)
    base = {"embeddings": {"uri": "x.npy"}, "num_clusters": 5, "output": "out"}
    settings = {"base": base, "space": {"heads.num_heads": [2]}, "seeds": [1, 2, 3, 4], "metric": "anmi"}
    judged, row = job._trial_row({"heads.num_heads": 2}, build_sweep(settings, "sweep.yaml"), Listings(), {})
    assert started == [2, 4]
    assert (row["seeds"], judged) == ((1, 2, 3, 4), pytest.approx(0.25))


@pytest.mark.parametrize("searcher", [None, "optuna"])
def test_a_trial_that_fails_is_no_error_for_tune_unless_a_searcher_has_to_know(
    monkeypatch: pytest.MonkeyPatch, searcher: str | None
) -> None:
    """After an error Tune would start another process for the next trial."""
    reported: list[Any] = []
    said: list[str] = []
    monkeypatch.setattr(job.tune, "report", reported.append)
    base = {"embeddings": {"uri": "x.npy"}, "num_clusters": 5, "output": "out"}
    space = {"heads.learning_rate": {"loguniform": [1e-4, 1e-2]}}
    asked = build_sweep({"base": base, "space": space, "searcher": searcher, "metric": "anmi"}, "sweep.yaml")
    drawn = {"heads.learning_rate": 1e-3}
    failures = {key_of(drawn): "it cannot be"}
    if searcher is not None:
        with pytest.raises(WorkerError, match="it cannot be"):
            job.run_trial(drawn, asked=asked, listings=Listings(), failures=failures)
        assert reported == []
        return
    job.run_trial(drawn, asked=asked, listings=Listings(), failures=failures)
    (result,) = reported
    row = job._row(3, SimpleNamespace(config=drawn, error=None, metrics=result))
    assert (row.trial, row.status, row.error, row.parameters) == (3, "failed", "it cannot be", drawn)
    log = job._TrialLog(SimpleNamespace(note=said.append), "anmi", 1, None)
    log.on_trial_complete(1, [], SimpleNamespace(config=drawn, last_result=result))
    assert said == ["1/1 trials: heads.learning_rate=0.001: failed"]


def test_every_trial_is_said_with_its_value_and_the_best_so_far() -> None:
    said: list[str] = []
    log = job._TrialLog(SimpleNamespace(note=said.append), "anmi", 3, None)
    ended: list[Any] = []
    for value in (0.5, 0.25, float("nan")):
        ended.append(
            SimpleNamespace(config={"seed": 1}, last_result={"judged": value, "row": {}}, is_finished=lambda: True)
        )
        log.on_trial_complete(1, ended, ended[-1])
    assert said == [
        "1/3 trials: seed=1: anmi 0.5000, best 0.5000",
        "2/3 trials: seed=1: anmi 0.2500, best 0.5000",
        "3/3 trials: seed=1: finished",
    ]
