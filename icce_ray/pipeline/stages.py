"""Which stages a run has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from icce_ray.assign.stage import ASSIGN
from icce_ray.classifier.stage import CLASSIFIER
from icce_ray.config import Config
from icce_ray.consensus.stage import CONSENSUS
from icce_ray.corrections.stage import CORRECTIONS, has_corrections
from icce_ray.count.stage import CLUSTER_COUNT
from icce_ray.embed.stage import EMBED
from icce_ray.evaluate.stage import EVALUATE
from icce_ray.images.stage import IMAGES
from icce_ray.methods import METHODS
from icce_ray.methods.stage import method_stage
from icce_ray.neighbors.stage import NEIGHBORS
from icce_ray.report.stage import REPORT
from icce_ray.sample.stage import SAMPLE
from icce_ray.stage import Stage


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of a run with this config, in order.

    With ``num_clusters: auto``, the method finds the number if it can; else `cluster_count` chooses it, and the stages
    after that are those of a run that was given the number, except for the report, which shows how it was chosen.

    With several methods, these are the stages of the first; the others are runs up to `method`, whose clusterings the
    consensus takes in.
    """
    method = config.methods[0]
    stages = [
        IMAGES,
        EMBED,
        SAMPLE,
        *([CLUSTER_COUNT] if config.is_auto and not config.finds_num_clusters else []),
        *([NEIGHBORS] if METHODS[method].needs_graph else []),
        method_stage(method, chooses_number=config.is_auto and config.finds_num_clusters),
        CONSENSUS,
        *([CORRECTIONS] if has_corrections(config) else []),
        CLASSIFIER,
        ASSIGN,
        EVALUATE,
        REPORT,
    ]
    return _with_own_inputs(stages)


def clustering_stages(config: Config) -> tuple[Stage, ...]:
    """The stages up to `method`, with a number of clusters that is known."""
    stages = stages_of(config)
    return stages[: [stage.name for stage in stages].index("method") + 1]


def _with_own_inputs(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages without the inputs that their run does not have."""
    names = {stage.name for stage in stages}
    return tuple(replace(stage, inputs=tuple(name for name in stage.inputs if name in names)) for stage in stages)
