"""The consensus stage on Ray: one task, on whichever machine has room, reads the label matrix and writes the parts."""

from __future__ import annotations

from typing import Any

import ray

from icce_ray.cluster import connect
from icce_ray.config import Config
from icce_ray.consensus.agreement import describe_clusters
from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.context import StageContext
from icce_ray.errors import WorkerError
from icce_ray.store import Artifact, ArtifactWriter

VERSION = 1
MAX_RETRIES = 3


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Make one clustering of all heads: labels.npy, agreement.npy, vote_entropy.npy, second_choice.npy, summary.json.

    Returns:
        method, anmi (of the labels, 0 to 1), anmi_by_method and start_anmi_by_method (after and before refinement),
        skipped (method: reason), mean_agreement, num_clusters (used), smallest_cluster, median_cluster, largest_cluster
        (images).

    Raises:
        WorkerError: the task's process died more often than it is retried.
    """
    connect(config.resources)
    context.progress.update(0, 1)
    task = ray.remote(_make_consensus).options(num_cpus=1, max_retries=MAX_RETRIES)
    try:
        writer, metrics = ray.get(task.remote(config, context.inputs["heads"], context.output))
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise WorkerError(
            f"consensus: its process died {MAX_RETRIES + 1} times. Out of memory is the usual cause: it needs about "
            "20 bytes per head and image, and 16 bytes per cluster and head's cluster"
        ) from error
    for part in writer.parts.values():
        context.output.add(part)
    context.progress.update(1, 1)
    return dict(metrics)


def _make_consensus(config: Config, heads: Artifact, output: ArtifactWriter) -> tuple[ArtifactWriter, dict[str, Any]]:
    labels_HN = heads.read_array("label_matrix.npy")
    consensus = config.consensus
    result = cluster_ensemble(
        labels_HN,
        config.num_clusters,
        methods=consensus.methods,
        random_state=config.seed,
        refine=consensus.refine,
        imbalance=consensus.imbalance,
        cspa_max_images=consensus.cspa_max_images,
        head_losses=heads.read_json("training.json")["head_losses"],
    )
    output.write_array("labels.npy", result.labels)
    output.write_array("agreement.npy", result.agreement)
    output.write_array("vote_entropy.npy", result.vote_entropy)
    output.write_array("second_choice.npy", result.second_choice)
    metrics = result.summary()
    clusters = describe_clusters(result.labels, result.agreement, result.second_choice, config.num_clusters)
    output.write_json("summary.json", metrics | {"clusters": clusters})
    return output, metrics
