"""The trials of a sweep on Ray Tune.

Each run of a trial is a Ray task, which trains in its own process, or starts workers if `resources.method` asks for
several or for a GPU. Tune's state is not kept: finished work is found by its fingerprint, and a searcher is told the
trials of an earlier attempt first.
"""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.search import create_searcher
from ray.tune.search.variant_generator import generate_variants

from icce_ray.config import Config
from icce_ray.errors import ResourceError, WorkerError
from icce_ray.runtime.cluster_resources import available_cpus
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import run_here
from icce_ray.store.cache import scratch_folder
from icce_ray.store.part_records import PartRecords
from icce_ray.sweeps import trial
from icce_ray.sweeps.sweep_config import CHOICE, GRID, Sweep
from icce_ray.sweeps.trial import Listings, RunOutcome, key_of, reason_of
from icce_ray.sweeps.trial_table import Row, parameters_text

TASK_RETRIES = 2
"""Retries of a run whose process died; what it had finished is used."""
TRIAL_RESOURCES = {"memory": 1e6}
"""Resources of the process that waits for a trial's tasks. It holds no CPU, which the tasks would lack."""
TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep, as it ends a run
}
SEED_ARGUMENTS = {
    "optuna": "seed",
    "hyperopt": "random_state_seed",
    "hebo": "random_state_seed",
    "bayesopt": "random_state",
}
DOMAINS: dict[str, Callable[..., Any]] = {
    GRID: lambda *values: tune.grid_search(list(values)),
    CHOICE: lambda *values: tune.choice(list(values)),
    "uniform": tune.uniform,
    "loguniform": tune.loguniform,
    # Tune excludes the upper end.
    "randint": lambda low, high: tune.randint(low, high + 1),
    "lograndint": lambda low, high: tune.lograndint(low, high + 1),
}
PARAMETERS = "parameters"

Parameters = dict[str, Any]


def draw(asked: Sweep) -> list[Parameters] | None:
    """The parameters of each trial, in order, without repetitions; None where a searcher chooses them."""
    if asked.config.searcher is not None:
        return None
    random = np.random.RandomState(asked.config.seed)
    has_draws = any(dimension.kind != GRID for dimension in asked.dimensions)
    drawn: dict[str, Parameters] = {}
    for _ in range(asked.config.num_samples if has_draws else 1):
        for _, parameters in generate_variants(_tune_space(asked), random_state=random):
            plain = _plain(parameters)
            drawn.setdefault(key_of(plain), plain)
    return list(drawn.values())


def run_trials(
    asked: Sweep,
    known: list[Parameters] | None,
    listings: Listings,
    failures: Mapping[str, str],
    records: PartRecords,
    progress: Progress,
) -> list[Row]:
    """Run all trials. Those that an earlier attempt finished find all that they need. `known` are the parameters of
    each trial; None if a searcher chooses them: those that it has chosen so far are in `records`. `failures` says why a
    trial cannot be run, by :func:`key_of` its parameters."""
    for key, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    config = asked.config
    searcher = None
    if known is None:
        assert config.searcher is not None
        earlier = [record.metrics[PARAMETERS] for record in records.read_all().values()]
        searcher = make_searcher(config.searcher, config.seed, earlier)
    num_trials = config.num_samples if known is None else len(known)
    at_a_time = available_cpus() / (config.cpus_per_run * len(config.seeds or (0,)))
    with scratch_folder() as folder:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(run_trial, asked=asked, listings=listings, failures=dict(failures)),
                tune.PlacementGroupFactory([TRIAL_RESOURCES]),
            ),
            param_space=_tune_space(asked) if known is None else {PARAMETERS: tune.grid_search(known)},
            tune_config=tune.TuneConfig(
                metric="judged",
                mode="max",
                search_alg=searcher,
                num_samples=config.num_samples if known is None else 1,
                reuse_actors=True,
                max_concurrent_trials=max(1, int(at_a_time)) if asked.is_in_one_process else 1,
            ),
            run_config=tune.RunConfig(
                storage_path=str(folder),
                callbacks=[_TrialLog(progress, config.metric, num_trials, None if known else records)],
                verbose=0,
            ),
        )
        results = tuner.fit()
        return [_row(number, results[number]) for number in range(len(results))]


def make_searcher(name: str, seed: int, earlier: list[Parameters]) -> Any:
    """A search algorithm of Tune's that first tries the parameters of `earlier`. Raises ResourceError: its package is
    not installed."""
    seeding = {SEED_ARGUMENTS[name]: seed} if name in SEED_ARGUMENTS else {}
    try:
        return create_searcher(name, metric="judged", mode="max", points_to_evaluate=earlier or None, **seeding)
    except (ImportError, AssertionError, ValueError) as error:
        raise ResourceError(
            f"searcher: {name} cannot be used: {' '.join(str(error).split())[:200]}. Install its package, or leave "
            "searcher out for grid and random search"
        ) from None


def run_trial(drawn: Parameters, *, asked: Sweep, listings: Listings, failures: Mapping[str, str]) -> None:
    """Run one trial: Tune calls this in a process of its own, which the next trial uses again, unless an error leaves
    this function. Only a searcher has to see that."""
    try:
        judged, row = _trial_row(_parameters(drawn), asked, listings, failures)
    except Exception as error:
        if asked.config.searcher is not None:
            raise
        judged, row = None, {"error": reason_of(error)}
    tune.report({"judged": np.nan if judged is None else judged, "row": row})


def _trial_row(
    parameters: Parameters, asked: Sweep, listings: Listings, failures: Mapping[str, str]
) -> tuple[float | None, Parameters]:
    """The value that trials are judged by, and the trial's values in the table."""
    if key_of(parameters) in failures:
        raise WorkerError(failures[key_of(parameters)])
    # A task that starts workers holds no CPU: they need it. SPREAD also keeps it out of the trial's own resources.
    cpus = asked.config.cpus_per_run if asked.is_in_one_process else 0
    task = ray.remote(_run).options(
        num_cpus=cpus, max_retries=TASK_RETRIES, scheduling_strategy="SPREAD", name="sweep trial"
    )
    runs = asked.runs(parameters)
    # A finished run is only read: a process for it would take seconds to start.
    started = {run.seed: task.remote(run, listings, cpus) for run in runs if not trial.is_finished(run, listings)}
    made: dict[int, RunOutcome] = dict(zip(started, ray.get(list(started.values())), strict=True))
    outcomes = [made[run.seed] if run.seed in made else trial.run(run, listings) for run in runs]
    metrics = trial.combine(outcomes)
    return metrics.get(asked.config.metric), {
        "metrics": metrics,
        "num_clusters_used": float(np.mean([outcome.num_clusters_used for outcome in outcomes])),
        "seconds": sum(outcome.seconds for outcome in outcomes),
        "seeds": tuple(outcome.seed for outcome in outcomes),
    }


def _run(config: Config, listings: Listings, cpus: float) -> RunOutcome:
    with run_here(max(1, int(cpus))) if cpus else nullcontext():
        return trial.run(config, listings)


class _TrialLog(tune.Callback):
    """Runs on the driver: reports each trial that ends, and records the choices of a searcher."""

    def __init__(self, progress: Progress, metric: str, num_trials: int, records: PartRecords | None) -> None:
        self.progress, self.metric, self.num_trials, self.records = progress, metric, num_trials, records
        self.best, self.num_started = -np.inf, 0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune stores its callbacks, which nothing reads

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.records is not None:
            self.records.write(f"{self.num_started:05d}", [], {PARAMETERS: _parameters(trial.config)})
        self.num_started += 1

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if "error" in trial.last_result.get("row", {}):
            self.on_trial_error(iteration, trials, trial)
            return
        value = trial.last_result.get("judged", np.nan)
        self.best = np.fmax(self.best, value)
        # `peers` is only known once all trials are finished.
        said = "finished" if np.isnan(value) else f"{self.metric} {value:.4f}, best {self.best:.4f}"
        self._say(trials, said, trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trials, "failed", trial)

    def _say(self, trials: list[Any], what: str, trial: Any) -> None:
        num_ended = 1 + sum(each.is_finished() for each in trials if each is not trial)
        given = parameters_text(_parameters(trial.config))
        self.progress.note(f"{num_ended}/{self.num_trials} trials: {given}: {what}")


def _row(number: int, result: Any) -> Row:
    parameters = _parameters(result.config)
    if result.error is not None:
        return Row(number, parameters, error=reason_of(result.error))
    row = (result.metrics or {}).get("row")
    return Row(number, parameters, error="it did not end") if row is None else Row(number, parameters, **row)


def _tune_space(asked: Sweep) -> dict[str, Any]:
    return {dimension.name: DOMAINS[dimension.kind](*dimension.values) for dimension in asked.dimensions}


def _parameters(drawn: Parameters) -> Parameters:
    """A trial's parameters from the config that Tune hands to it."""
    return _plain(drawn.get(PARAMETERS, drawn))


def _plain(parameters: Parameters) -> Parameters:
    """The same as plain Python values."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in parameters.items()}
