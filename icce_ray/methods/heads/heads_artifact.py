"""The heads stage in this process, without Ray: from its inputs on storage to the artifact's files. A worker of job.py
runs it with a communicator; sweeps run it as it is."""

from __future__ import annotations

from typing import Any

from icce_ray.config import Config
from icce_ray.embed.feature_matrix import load_features
from icce_ray.errors import WorkerError
from icce_ray.methods.heads.checkpoint import CheckpointFolder
from icce_ray.methods.heads.communicator import Communicator, SingleWorker
from icce_ray.methods.heads.fit import fit, stage_metrics
from icce_ray.neighbors.graph import load_graph
from icce_ray.sample.training_set import training_set
from icce_ray.stage import StageContext


def run(
    config: Config, context: StageContext, communicator: Communicator | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Train with torch's threads, from the newest checkpoint on, and write the files of the artifact. Returns the
    metrics of the stage, see job.py; none on workers of a rank other than 0, which write nothing. Raises ResourceError:
    training would not fit into memory, or there are more workers than heads; WorkerError: the loss was not finite.

    Args:
        communicator: the workers, of which this process is one; None: it is alone.
    """
    communicator = communicator or SingleWorker()
    folder = context.output.folder
    try:
        clusterings = fit(
            load_features(training_set(context.inputs)).matrix,
            load_graph(context.inputs["neighbors"]),
            config.heads,
            num_clusters=config.num_clusters,
            seed=config.seed,
            device=device,
            progress=context.progress,
            folder=folder,
            communicator=communicator,
        )
    except FloatingPointError as error:
        raise WorkerError(f"heads: {error}") from error
    if communicator.rank != 0:
        return {}
    clusterings.write(context.output)
    CheckpointFolder(folder).clear()
    return stage_metrics(clusterings) | {"num_workers": communicator.num_workers}
