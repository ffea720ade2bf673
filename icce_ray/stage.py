"""What a stage is handed besides the config: where its result goes, what it builds on, whom it keeps informed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from icce_ray.runtime.progress import Progress
from icce_ray.store import Artifact, ArtifactWriter


@dataclass(frozen=True)
class StageContext:
    """Handed to every stage's ``run(config, context) -> metrics``."""

    output: ArtifactWriter
    """The stage writes its parts here; the pipeline commits them. Parts that a killed run left are still there."""
    inputs: Mapping[str, Artifact]
    """Finished artifacts by stage name."""
    progress: Progress
    """Started by the pipeline; the stage calls ``update(done, total)``."""
