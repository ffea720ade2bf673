"""All settings of a sweep, each declared once with its meaning under it, and its search space: the values of each
setting, by its dotted name. It is validated here, before anything starts; job.py draws from it.

    base: run.yaml
    space:
      heads.num_heads: [8, 16]                      # a list: every value, crossed with the other lists
      heads.learning_rate: {loguniform: [1e-4, 1e-2]}
      neighbors.similarity_threshold: {choice: [auto, 0.4, 0.5]}
    num_samples: 4
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from icce_ray.config import (
    AUTO,
    Config,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    apply_override,
    build_config,
    put,
    read_yaml,
    validate,
)
from icce_ray.errors import ConfigError
from icce_ray.methods import METHODS

GRID = "grid"
CHOICE = "choice"
FLOAT_RANGES = ("uniform", "loguniform")
INTEGER_RANGES = ("randint", "lograndint")
LOG_RANGES = ("loguniform", "lograndint")
KINDS = (GRID, CHOICE, *FLOAT_RANGES, *INTEGER_RANGES)
FIXED = {
    "output": "all trials share one output, so that they share embeddings and graphs",
    "resources": "it changes no result",
    "storage": "it changes no result",
    "classifier": "no metric of a sweep depends on it",
    "assign": "no metric of a sweep depends on it",
    "evaluate": "no metric of a sweep depends on it",
    "report": "no metric of a sweep depends on it",
}
"""Settings that a sweep cannot vary, and why."""
Metric = Literal["anmi", "generalization", "peers", "silhouette_pca", "silhouette_umap", "stability"]
Searcher = Literal["optuna", "hyperopt", "bayesopt", "hebo", "ax"]
TRAINS_HEADS = {name for name, method in METHODS.items() if method.section == "heads"}
NOT_IN_FINGERPRINT = {"cpus_per_run", "base"}


@dataclass(frozen=True)
class Dimension:
    """The values of one setting."""

    name: str
    """Dotted name in the config."""
    kind: str
    """One of KINDS."""
    values: tuple[Any, ...]
    """The values of a grid or a choice; the lowest and the highest of a range, both included."""


def settings_of(base: Mapping[str, Any], parameters: Mapping[str, Any], source: str, seed: int | None = None) -> Config:
    """The base config with these settings and this seed. Raises ConfigError: they do not go together."""
    data = dict(base)
    for name, value in parameters.items():
        put(data, name, value)
    if seed is not None:
        data["seed"] = seed
    if "method" in parameters and build_config(data | {"num_clusters": AUTO}, source).finds_num_clusters:
        data["num_clusters"] = AUTO  # the base's number is for the other methods
    config = build_config(data, source)
    if config.is_auto and not config.finds_num_clusters:
        raise ConfigError(
            f"{source}: num_clusters: a sweep cannot compare 'auto', which is chosen by a run, unless the method finds "
            "it; give a number, or several in the space"
        )
    return config


def _parse_dimension(name: str, given: Any, source: str) -> Dimension:
    key = f"{source}: space.{name}"
    reason = FIXED.get(name.partition(".")[0])
    if reason is not None:
        raise ConfigError(f"{key}: a sweep cannot vary this: {reason}. Set it in the base")
    if isinstance(given, list):
        given = {GRID: given}
    if not isinstance(given, dict) or len(given) != 1 or next(iter(given)) not in KINDS:
        raise ConfigError(
            f"{key}: {given!r} is not a search space; give a list of values, or one of {', '.join(KINDS)}"
        )
    ((kind, values),) = given.items()
    if kind in (GRID, CHOICE):
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{key}: {kind} needs a list of at least one value, not {values!r}")
        return Dimension(name, kind, tuple(values))
    return Dimension(name, kind, _parse_range(key, kind, values))


def _parse_range(key: str, kind: str, values: Any) -> tuple[Any, Any]:
    number = int if kind in INTEGER_RANGES else float
    try:
        # YAML reads 1e-4 as a string.
        low, high = (number(value) for value in values)
    except (TypeError, ValueError):
        what = "whole numbers" if number is int else "numbers"
        raise ConfigError(f"{key}: {kind} needs two {what}, the lowest and the highest, not {values!r}") from None
    if not low < high:
        raise ConfigError(f"{key}: {kind} from {low} to {high}: the first must be below the second")
    if kind in LOG_RANGES and low <= 0:
        raise ConfigError(f"{key}: {kind} from {low}: a logarithmic range must start above 0")
    return low, high


class EnsembleConfig(Section):
    top: PositiveInt = 5
    """Pool this many of the best trials. On real features, five were better than the best one alone when trials were
    chosen by `stability`; three were not always."""
    quantile: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Instead of `top`: pool the trials whose metric is at or above this quantile of all finished trials. 0.8: the best
    fifth."""

    @model_validator(mode="after")
    def _check(self) -> EnsembleConfig:
        if self.quantile is not None and "top" in self.model_fields_set:
            raise ValueError("give either top or quantile")
        return self


class SweepConfig(Section):
    base: str | dict[str, Any]
    """The config that all trials start from: a YAML file, relative to the sweep's, or its settings."""
    space: dict[str, Any]
    """The settings that vary, by dotted name. Every value of a list is tried, crossed with the other lists. Values of
    `{choice: [...]}`, `{uniform: [low, high]}`, `{loguniform: [low, high]}`, `{randint: [low, high]}` and
    `{lograndint: [low, high]}` are drawn at random."""
    num_samples: PositiveInt = 10
    """Number of draws at each point of the grid; with a searcher, number of trials. Not used if nothing is drawn."""
    searcher: Searcher | None = None
    """A search algorithm of Ray Tune that learns from the trials so far. Its package must be installed, for example by
    `pip install optuna`. Not set: grid and random search."""
    seeds: tuple[Seed, ...] | None = None
    """Each trial is run with each of these seeds; its metrics are the means. Not set: the base's seed alone."""
    metric: Metric = "silhouette_pca"
    """The best trial has the highest value. None of these looks at true labels. `anmi`: how well the clusterings agree
    with their consensus. `generalization`: how well a linear classifier learns the clusters. `silhouette_pca`,
    `silhouette_umap`: how far the clusters are apart in that space (UMAP needs umap-learn). `stability`: how alike the
    clusters of two seeds are. `peers`: how alike the clusters are to those of the other trials; it needs at least three
    trials, and no searcher can learn from it. Not set: whatever ranked trials best where it was measured. That is
    `peers` if the `space` has several methods, or the base's method trains no heads; of heads it is `stability` with
    several `seeds`, else `silhouette_pca`. The silhouettes and `generalization` depend on the features, so they compare
    trials over the same features only."""
    seed: Seed = 0
    """Seed of the draws from the space."""
    ensemble: EnsembleConfig | None = EnsembleConfig()
    """The job after the sweep: one consensus of the best trials, then classifier, assignments and report. `null`: no
    such job."""
    cpus_per_run: PositiveFloat = 1.0
    """CPUs for each run, that is for each seed of a trial. As many trials run at a time as there are CPUs for. Not used
    if the base's `resources.method` asks for several workers or for GPUs: then one trial at a time runs on those."""

    @model_validator(mode="before")
    @classmethod
    def _choose_metric(cls, data: Any) -> Any:
        if isinstance(data, dict) and "metric" not in data:
            base, space, seeds = (data.get(name) for name in ("base", "space", "seeds"))
            methods = [base.get("method", "icce")] if isinstance(base, dict) else []
            if isinstance(space, dict) and "method" in space:
                methods.append("several")
            if data.get("searcher") is None and not set(methods) <= TRAINS_HEADS:
                return {**data, "metric": "peers"}
            if isinstance(seeds, list | tuple) and len(seeds) > 1:
                return {**data, "metric": "stability"}
        return data

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        if self.seeds is not None and (not self.seeds or len(set(self.seeds)) < len(self.seeds)):
            raise ValueError(f"seeds is {list(self.seeds)}; name at least one, and each once")
        if self.seeds is not None and "seed" in self.space:
            raise ValueError("the seed is in the space and in seeds; choose one: seeds makes means, space makes trials")
        if self.metric == "stability" and len(self.seeds or ()) < 2:
            raise ValueError("metric is stability, which compares seeds; give at least two, such as seeds: [0, 1]")
        if self.metric == "peers" and self.searcher is not None:
            raise ValueError("metric is peers, which compares all trials at the end; a searcher needs another metric")
        return self


@dataclass(frozen=True)
class Sweep:
    """A sweep, validated."""

    config: SweepConfig
    base: Mapping[str, Any]
    """The base's settings, as given."""
    dimensions: tuple[Dimension, ...]
    source: str
    """Its file, for error messages."""

    @property
    def base_config(self) -> Config:
        return settings_of(self.base, {}, self.source)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the settings that vary."""
        return tuple(dimension.name for dimension in self.dimensions)

    @property
    def is_in_one_process(self) -> bool:
        """Whether each run is made in one process, instead of by the workers of `resources.method`."""
        workers = self.base_config.resources.method
        return workers.gpus_per_worker == 0 and workers.num_workers == 1

    def runs(self, parameters: Mapping[str, Any]) -> list[Config]:
        """The config of each run of a trial: one for each seed. Raises ConfigError: the parameters do not go
        together."""
        seeds = self.config.seeds or (None,)
        return [settings_of(self.base, parameters, "this trial", seed) for seed in seeds]

    def settings(self) -> dict[str, Any]:
        """Everything that determines which trials there are and which is best, JSON-able."""
        return {
            "base": self.base_config.model_dump(mode="json", exclude={"resources", "storage"}),
            "sweep": self.config.model_dump(mode="json", exclude=NOT_IN_FINGERPRINT),
        }


def load_sweep(path: str | Path, overrides: list[str] | None = None) -> Sweep:
    """Read a sweep's YAML, apply ``a.b=c`` overrides (``base.heads.num_epochs=20`` changes the base) and validate it.
    Raises ConfigError: names the file, the key, the value and what is allowed, for the first kind of problem found."""
    path = Path(path)
    data = read_yaml(path)
    base = data.get("base")
    if isinstance(base, str):
        data["base"] = read_yaml(path.parent / base)
    for override in overrides or []:
        apply_override(data, override)
    return build_sweep(data, str(path))


def build_sweep(data: dict[str, Any], source: str) -> Sweep:
    """Validate a sweep from `source`, which messages name."""
    config = validate(SweepConfig, data, source)
    if isinstance(config.base, str):
        raise ConfigError(f"{source}: base is {config.base!r}; give the settings, or load the sweep from a file")
    if not config.space:
        raise ConfigError(f"{source}: space is empty; name at least one setting, such as heads.num_heads: [8, 16]")
    dimensions = tuple(_parse_dimension(str(name), given, source) for name, given in config.space.items())
    settings_of(config.base, {}, f"{source}: base")
    # Each value is tried alone on the base: values that only fail together fail in the trial that draws them.
    for dimension in dimensions:
        for value in dimension.values:
            settings_of(config.base, {dimension.name: value}, f"{source}: space")
    sweep = Sweep(config, config.base, dimensions, source)
    if config.searcher is not None and any(dimension.kind == GRID for dimension in dimensions):
        name = next(dimension.name for dimension in dimensions if dimension.kind == GRID)
        raise ConfigError(
            f"{source}: space.{name}: searcher {config.searcher} takes no list; write {{choice: [...]}} instead"
        )
    return sweep
