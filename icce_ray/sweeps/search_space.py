"""The search space of a sweep: the values of each setting, by its dotted name. It is validated here, before anything
starts; job.py draws from it.

    heads.num_heads: [8, 16]                      # a list: every value, crossed with the other lists
    heads.learning_rate: {loguniform: [1e-4, 1e-2]}
    neighbors.similarity_threshold: {choice: [auto, 0.4, 0.5]}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from icce_ray.config import AUTO, Config, build_config, put
from icce_ray.errors import ConfigError

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


@dataclass(frozen=True)
class Dimension:
    """The values of one setting."""

    name: str
    """Dotted name in the config."""
    kind: str
    """One of KINDS."""
    values: tuple[Any, ...]
    """The values of a grid or a choice; the lowest and the highest of a range, both included."""


def parse_space(space: Mapping[str, Any], source: str) -> tuple[Dimension, ...]:
    """The dimensions of a search space. Raises ConfigError: the space is empty, a setting cannot be varied, or its
    values are neither a list nor a valid range."""
    if not space:
        raise ConfigError(f"{source}: space is empty; name at least one setting, such as heads.num_heads: [8, 16]")
    return tuple(_parse_dimension(str(name), given, source) for name, given in space.items())


def check_space(base: Mapping[str, Any], dimensions: tuple[Dimension, ...], source: str) -> None:
    """Refuse unknown settings and values that they cannot have. Each value is tried alone on the base: values that only
    fail together fail in the trial that draws them. Raises ConfigError: the config's own message."""
    settings_of(base, {}, f"{source}: base")
    for dimension in dimensions:
        for value in dimension.values:
            settings_of(base, {dimension.name: value}, f"{source}: space")


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
