"""TURTLE on Ray: each worker trains some blocks of runs, which exchange nothing. One worker is an actor, several are
Ray Train's.

A run of the pipeline that was killed keeps the finished runs, and goes on from the checkpoints of the others, on any
number of workers.
"""

from functools import partial
from typing import Any

from icce_ray.config import Config
from icce_ray.embed.feature_matrix import feature_set_names, load_features
from icce_ray.errors import UserError, WorkerError
from icce_ray.methods import METHODS
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.workers import work_on_workers
from icce_ray.sample.training_set import training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact
from icce_ray.store.part_records import PartRecords

RUNS_FOLDER = "runs"


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Train all runs on all feature sets: label_matrix.npy (runs x N int32), clusterings.json (losses, which are 1 -
    generalisation score; the scores; the history) and turtle.safetensors (the layers). The number of workers does not
    change the result.

    Returns num_runs, feature_sets, generalization_scores, best_run (highest score), prediction_error (mean over runs,
    last step). Raises ResourceError: training would not fit into a worker's memory; WorkerError: the loss was not
    finite, or workers died more often than training is restarted.
    """
    features = training_set(context.inputs)
    records = PartRecords(context.output.folder / RUNS_FOLDER, f"{features.identity}-{METHODS['turtle'].version}")
    num_images = load_features(features).num_images
    # Imported here: torch takes seconds, and workers of another process need it as well.
    from icce_ray.methods.turtle.run_block import run_blocks
    from icce_ray.methods.turtle.train_runs import clusterings_of, read_runs

    blocks = run_blocks(config.turtle.num_runs, config.num_clusters)
    work_on_workers(
        "method",
        partial(_work, config=config, features=features, records=records, blocks=blocks),
        config.resources,
        context.progress,
        num_images,
        max_workers=len(blocks),
        backend="gloo",  # on GPUs too: the workers exchange nothing
    )
    finished = [found for runs in blocks if (found := read_runs(records, runs)) is not None]
    assert len(finished) == len(blocks)
    clusterings = clusterings_of(finished)
    clusterings.write(context.output)
    records.folder.clear()
    scores: list[float] = clusterings.notes["generalization_scores"]
    return {
        "num_runs": len(scores),
        "feature_sets": feature_set_names(features),
        "generalization_scores": scores,
        "best_run": scores.index(max(scores)),
        "prediction_error": clusterings.history[-1]["loss"],
    }


def _work(
    *,
    config: Config,
    features: Artifact,
    records: PartRecords,
    blocks: list[range],
    num_threads: int,
    device: str,
    progress: Progress,
) -> None:
    """The work of one worker: every block whose number leaves its rank as the remainder."""
    # Imported here: the driver imports this module too, and torch takes seconds.
    import torch
    import torch.distributed as dist

    from icce_ray.methods.turtle.train_runs import train_runs

    torch.set_num_threads(num_threads)
    rank, num_workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        train_runs(
            [load_features(features, number).matrix for number in range(len(feature_set_names(features)))],
            config.turtle,
            blocks[rank::num_workers],
            num_clusters=config.num_clusters,
            seed=config.seed,
            device=device,
            num_threads=num_threads,
            progress=progress,
            records=records,
        )
    except (FloatingPointError, UserError) as error:
        if rank:
            raise RuntimeError(str(error)) from error  # errors are handed on as such from the first worker only
        if isinstance(error, UserError):
            raise
        raise WorkerError(f"turtle: {error}") from error
