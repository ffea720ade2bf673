"""Scikit-learn's clusterers on Ray: one worker clusters all images of the sample."""

from functools import partial
from typing import Any

from icce_ray.config import Config
from icce_ray.embed.feature_matrix import load_features
from icce_ray.methods.clusterings import Clusterings
from icce_ray.runtime.machine import check_umap
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.workers import work_on_workers
from icce_ray.sample.training_set import training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact


def check(config: Config) -> None:
    """Refuse UMAP where its package is missing. Raises ResourceError: it is."""
    if config.conventional.representation == "umap":
        check_umap("conventional.representation: umap")


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Write label_matrix.npy (1 x N int32, -1 for noise) and clusterings.json. Returns num_clusters (found), num_noise,
    converged. Raises InputError: fewer than two clusters were found; ResourceError: the worker lacks the memory."""
    embed = training_set(context.inputs)
    num_images = load_features(embed).num_images
    work = partial(_work, config=config, embed=embed)
    made: Clusterings = work_on_workers("method", work, config.resources, context.progress, num_images, max_workers=1)
    made.write(context.output)
    if made.notes["num_noise"]:
        context.progress.note(f"{made.notes['num_noise']:,} of {num_images:,} images are noise, without a cluster")
    if not made.notes["converged"]:
        context.progress.note(f"{config.methods[0]} stopped before it converged; its clusters may be poor")
    return dict(made.notes)


def _work(*, config: Config, embed: Artifact, num_threads: int, device: str, progress: Progress) -> Clusterings:
    # Imported here: the driver imports this module too, and scikit-learn takes seconds.
    from icce_ray.methods.conventional.scikit_clusterers import fit

    return fit(
        load_features(embed).matrix,
        config.conventional,
        method=config.methods[0],
        num_clusters=None if config.finds_num_clusters else config.num_clusters,
        seed=config.seed,
        progress=progress,
    )
