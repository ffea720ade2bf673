"""The trials of a sweep on Ray Tune.

A trial takes no CPU itself: it asks for a Ray task for each of its runs, which trains in one process, or, where
`resources.method` says so, starts Ray Train. Tune's own state remembers the search where a sweep was killed.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.search import create_searcher
from ray.tune.search.variant_generator import generate_variants

from icce_ray.config import Config
from icce_ray.errors import ResourceError, UserError, WorkerError, describe_cause, find_cause
from icce_ray.runtime.cluster_resources import available_cpus
from icce_ray.runtime.progress import Progress
from icce_ray.store import Folder
from icce_ray.sweeps import trial
from icce_ray.sweeps.search_space import CHOICE, GRID, Dimension
from icce_ray.sweeps.sweep_config import Sweep
from icce_ray.sweeps.trial import Listings, RunOutcome
from icce_ray.sweeps.trial_table import FAILED, FINISHED, Row, from_parameters, setting_text

TASK_RETRIES = 2
"""Of a task whose process died; what it had finished is used."""
TRIAL_RESOURCES = {"memory": 1e6}
"""Of the process that waits for a trial's tasks. Not CPUs: they would be missing to the tasks."""
QUIET_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
}
SEED_ARGUMENTS = {
    "optuna": "seed",
    "hyperopt": "random_state_seed",
    "hebo": "random_state_seed",
    "bayesopt": "random_state",
}
RANGES: dict[str, Callable[[Any, Any], Any]] = {
    "uniform": tune.uniform,
    "loguniform": tune.loguniform,
    # Tune leaves the upper end out.
    "randint": lambda low, high: tune.randint(low, high + 1),
    "lograndint": lambda low, high: tune.lograndint(low, high + 1),
}

Parameters = dict[str, Any]


def draw(asked: Sweep) -> list[Parameters] | None:
    """What each trial is given, in order, none twice; None where a searcher will decide as it goes."""
    if asked.config.searcher is not None:
        return None
    space = {dimension.name: _to_tune(dimension) for dimension in asked.dimensions}
    random = np.random.RandomState(asked.config.seed)
    has_draws = any(dimension.kind != GRID for dimension in asked.dimensions)
    drawn: dict[str, Parameters] = {}
    for _ in range(asked.config.num_samples if has_draws else 1):
        for _, parameters in generate_variants(space, random_state=random):
            plain = from_parameters(parameters)
            drawn.setdefault(key_of(plain), plain)
    return list(drawn.values())


def run_trials(
    asked: Sweep,
    known: list[Parameters] | None,
    listings: Listings,
    failures: Mapping[str, str],
    state: Folder,
    progress: Progress,
) -> list[Row]:
    """Run all trials, or those that an earlier try of the same sweep left.

    Args:
        known: what each trial is given; None where a searcher decides.
        failures: why a trial cannot be run, by :func:`key_of` what it is given.
        state: a local folder for what Tune remembers. It holds no result.
    """
    for key, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, asked=asked, listings=listings, failures=dict(failures)),
        tune.PlacementGroupFactory([TRIAL_RESOURCES]),
    )
    Announcer.progress, Announcer.metric, Announcer.best = progress, asked.config.metric, -np.inf
    Announcer.total = len(known) if known is not None else asked.config.num_samples
    if tune.Tuner.can_restore(state.path):
        progress.note("goes on where it was")
        tuner = tune.Tuner.restore(state.path, trainable, resume_unfinished=True, restart_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"parameters": _param_space(asked, known)},
            tune_config=_tune_config(asked, known),
            run_config=tune.RunConfig(
                name=state.path.rpartition("/")[2],
                storage_path=state.path.rpartition("/")[0],
                callbacks=[Announcer()],
                verbose=0,
            ),
        )
    return [_row(number, result) for number, result in enumerate(_fit_in_thread(tuner))]


def _param_space(asked: Sweep, known: list[Parameters] | None) -> Any:
    if known is not None:
        return tune.grid_search(known)
    return {dimension.name: _to_tune(dimension) for dimension in asked.dimensions}


def _tune_config(asked: Sweep, known: list[Parameters] | None) -> tune.TuneConfig:
    config = asked.config
    slots = int(available_cpus() / (config.cpus_per_run * len(config.seeds or (0,))))
    return tune.TuneConfig(
        metric="judged",
        mode="max",
        search_alg=make_searcher(config.searcher, config.seed) if config.searcher is not None else None,
        num_samples=1 if known is not None else config.num_samples,
        reuse_actors=True,
        max_concurrent_trials=config.max_concurrent or (max(1, slots) if asked.is_in_one_process else 1),
    )


def make_searcher(name: str, seed: int) -> Any:
    """A search algorithm of Tune's.

    Raises:
        ResourceError: its package is not installed.
    """
    seeding = {SEED_ARGUMENTS[name]: seed} if name in SEED_ARGUMENTS else {}
    try:
        return create_searcher(name, metric="judged", mode="max", **seeding)
    except (ImportError, AssertionError, ValueError) as error:
        raise ResourceError(
            f"searcher: {name} cannot be used: {' '.join(str(error).split())[:200]}. Install its package, or leave "
            "searcher out for grid and random search"
        ) from None


def run_trial(drawn: Parameters, *, asked: Sweep, listings: Listings, failures: Mapping[str, str]) -> None:
    """What Tune calls for each trial: ask for its runs, report its metrics."""
    parameters = from_parameters(drawn["parameters"])
    if key_of(parameters) in failures:
        raise WorkerError(failures[key_of(parameters)])
    runs = asked.runs(parameters)
    outcomes = _together(asked, [(run, listings, asked.is_in_one_process) for run in runs])
    metrics = trial.combine(outcomes)
    row = {
        "status": FINISHED,
        "metrics": metrics,
        "num_clusters_used": float(np.mean([found.num_clusters_used for found in outcomes])),
        "seconds": sum(found.seconds for found in outcomes),
        "seeds": tuple(found.seed for found in outcomes),
    }
    judged = metrics.get(asked.config.metric)
    tune.report({"judged": float("nan") if judged is None else judged, "row": row})


def _together(asked: Sweep, calls: Sequence[tuple[Config, Listings, bool]]) -> list[RunOutcome]:
    """The outcome of each run, each in a Ray task."""
    # A task that starts jobs of its own takes no CPU: they need it. SPREAD also keeps it out of the trial's resources.
    cpus = asked.config.cpus_per_run if asked.is_in_one_process else 0
    task = ray.remote(_call).options(
        num_cpus=cpus, max_retries=TASK_RETRIES, scheduling_strategy="SPREAD", name="sweep trial"
    )
    return list(ray.get([task.remote(max(1, int(cpus)), *call) for call in calls]))


def _call(num_threads: int, config: Config, listings: Listings, in_one_process: bool) -> RunOutcome:
    import torch

    torch.set_num_threads(num_threads)
    return trial.run(config, listings, in_one_process)


class Announcer(tune.Callback):
    """Says on the driver that a trial ended. What it needs is set on the class: Tune stores and restores the object."""

    progress: Progress | None = None
    metric, best, done, total = "", -np.inf, 0, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        value = trial.last_result.get("judged", float("nan"))
        Announcer.best = max(Announcer.best, value)
        self._say(trials, f"{Announcer.metric} {value:.4f}, best {Announcer.best:.4f}", trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trials, FAILED, trial)

    def _say(self, trials: list[Any], what: str, trial: Any) -> None:
        ended = 1 + sum(each.is_finished() for each in trials if each is not trial)
        given = ", ".join(f"{name}={setting_text(value)}" for name, value in trial.config["parameters"].items())
        if Announcer.progress is not None:
            Announcer.progress.note(f"{ended}/{Announcer.total} trials: {given}: {what}")


def _row(number: int, result: Any) -> Row:
    parameters = from_parameters(result.config["parameters"])
    if result.error is not None:
        return Row(number, FAILED, parameters, error=reason_of(result.error))
    row = (result.metrics or {}).get("row")
    if row is None:
        return Row(number, FAILED, parameters, error="it did not end")
    return Row(number, parameters=parameters, **row)


def _to_tune(dimension: Dimension) -> Any:
    if dimension.kind == GRID:
        return tune.grid_search(list(dimension.values))
    if dimension.kind == CHOICE:
        return tune.choice(list(dimension.values))
    return RANGES[dimension.kind](*dimension.values)


def _fit_in_thread(tuner: tune.Tuner) -> Any:
    """In a thread of its own: in the main thread Tune takes Ctrl-C for itself."""
    results: Future[Any] = Future()

    def fit() -> None:
        try:
            results.set_result(tuner.fit())
        except BaseException as error:
            results.set_exception(error)

    threading.Thread(target=fit, name="icce_ray-sweep", daemon=True).start()
    return results.result()


def key_of(parameters: Parameters) -> str:
    """The same text for the same parameters."""
    return json.dumps(parameters, sort_keys=True)


def reason_of(error: BaseException) -> str:
    """One line that says why something failed."""
    return str(find_cause(error, UserError) or describe_cause(error))
