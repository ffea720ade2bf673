"""A stage: one step of the flow, and its inputs when it runs.

Each stage's folder declares it in ``stage.py``, which imports neither Ray nor torch; `icce_ray.pipeline` orders them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from icce_ray.config import Config, EvaluateConfig
from icce_ray.runtime.progress import Progress
from icce_ray.store import Artifact, ArtifactWriter

Settings = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One step of the flow."""

    name: str
    module: str
    """Its function ``run(config, context) -> metrics`` does the work."""
    version: int
    """Raised by hand when the code would make something else of the same settings."""
    inputs: tuple[str, ...]
    """Names of the stages it builds on. Those that a run does not have are left out."""
    settings: Callable[[Config], Settings]
    """Everything that determines the result besides the inputs."""
    unit: str = "images"
    """What its progress counts."""
    check: Callable[[Config], object] | None = None
    """Raises a UserError, before any work starts, if the stage cannot succeed with this config."""
    chooses_number: bool = False
    """Whether it chooses the number of clusters: its metrics then have `num_clusters`, and later stages are planned
    once it is finished."""
    shortcut: Callable[[Config], str] | None = None
    """What to set to be done much sooner, or "": said if the stage turns out to take hours."""
    sees_labels: bool = False
    """Whether `run`, `settings` and `check` may know where the true labels are. Only evaluation may."""

    def config_of(self, config: Config) -> Config:
        """`config` as this stage may see it."""
        return config if self.sees_labels else config.model_copy(update={"evaluate": EvaluateConfig()})


@dataclass(frozen=True)
class StageContext:
    """Handed to every stage's ``run(config, context) -> metrics``."""

    output: ArtifactWriter
    """The stage writes its parts here; the pipeline commits them. Parts left by a killed run are still there."""
    inputs: Mapping[str, Artifact]
    """Finished artifacts by stage name."""
    progress: Progress
    """Started by the pipeline; the stage calls ``update(done, total)``."""


def num_clusters_and_seed(config: Config) -> Settings:
    """Settings that most stages depend on."""
    return {"num_clusters": config.num_clusters, "seed": config.seed}
