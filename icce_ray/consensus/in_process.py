"""The consensus stage in this process, without Ray: the same parts and the same labels as job.py, for small
collections. Sweeps use it. And the parts of the stage, which both write.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from icce_ray.config import Config
from icce_ray.consensus.agreement import describe_clusters
from icce_ray.consensus.best_consensus import EnsembleResult, find_consensus
from icce_ray.consensus.consensus_memory import check_memory
from icce_ray.consensus.extra_runs import find_heads
from icce_ray.consensus.hierarchy import HIERARCHY_NAME
from icce_ray.consensus.label_matrix import check_surveys
from icce_ray.consensus.stored_label_matrix import StoredHeads, open_heads
from icce_ray.methods.clusterings import read_losses
from icce_ray.stage import StageContext


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Make one clustering of all heads; parts and metrics as in job.py.

    Raises:
        InputError: labels that cannot be used, or extra runs that are not there or have other images.
        ResourceError: this machine lacks the memory.
    """
    own = context.inputs["method"]
    extra = find_heads(config, own)
    stored = open_heads([own, *extra])
    surveys = list(stored.map(StoredHeads.survey, stored.image_pieces()))
    heads = replace(stored, values=check_surveys(surveys))
    check_memory(heads, config.num_clusters, config.consensus)
    result = find_consensus(
        heads,
        config.num_clusters,
        config.consensus,
        seed=config.seed,
        # Losses of runs with other settings cannot be compared.
        head_losses=None if extra else read_losses(own),
        say=context.progress.update,
    )
    return write_parts(result, heads.num_heads, config, context)


def write_parts(result: EnsembleResult, num_heads: int, config: Config, context: StageContext) -> dict[str, Any]:
    """Write the stage's parts, say what was left out, and return the stage's metrics."""
    for method, reason in result.skipped.items():
        context.progress.note(f"{method} left out: {reason}")
    output = context.output
    output.write_array("labels.npy", result.labels)
    output.write_array("agreement.npy", result.agreement)
    output.write_array("vote_entropy.npy", result.vote_entropy)
    output.write_array("second_choice.npy", result.second_choice)
    metrics = result.summary() | {"num_heads": num_heads}
    output.write_table(HIERARCHY_NAME, result.hierarchy.to_table())
    clusters = describe_clusters(result.labels, result.agreement, result.second_choice, config.num_clusters)
    output.write_json("summary.json", metrics | {"clusters": clusters})
    return metrics
