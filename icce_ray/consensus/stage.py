"""The ``consensus`` stage: one clustering of all rows of the label matrix."""

from icce_ray.config import Config
from icce_ray.stage import Settings, Stage, num_clusters_and_seed

AUTO, NONE = "auto", "none"
"""Values of `consensus.numbers_from` besides the name of a run."""


def _settings(config: Config) -> Settings:
    settings: Settings = {"consensus": config.consensus.model_dump(exclude={"numbers_from"})}
    if config.consensus.numbers_from not in (AUTO, NONE):
        settings["numbers_from"] = config.consensus.numbers_from
    return num_clusters_and_seed(config) | settings


def _check(config: Config) -> None:
    if config.consensus.extra_runs:
        from icce_ray.consensus.other_runs import find_heads

        find_heads(config.consensus.extra_runs, config.output)


CONSENSUS = Stage(
    "consensus",
    "icce_ray.consensus.job",
    12,
    ("embed", "sample", "method", "neighbors"),
    _settings,
    "steps",
    check=_check,
)
