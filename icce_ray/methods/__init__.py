"""The methods: ways to make a label matrix, H clusterings of the same N images (docs/METHOD.md, "Methods").

Everything after a method needs nothing but that matrix, so consensus, agreement, classifier, assignment, report,
sweeps and the choice of the number of clusters work for every method. A new one is a folder here whose ``job.py`` has
``run(config, context)`` and writes `icce_ray.methods.clusterings.Clusterings`, its settings as a section of the config,
and one line in the table below.

This module imports nothing, since the config is checked against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Method:
    """How a method is run."""

    job: str
    """The module whose ``run(config, context)`` writes the clusterings."""
    section: str
    """The section of the config with its settings."""
    version: int
    """Raised by hand when the code would make other clusterings of the same settings."""
    needs_graph: bool
    """Whether it is handed the neighbour graph."""
    unit: str
    """What its progress counts."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings by section that it fills in where the config leaves them open."""
    free_settings: frozenset[str] = frozenset()
    """Settings of its section that do not change its result."""


_ICCE = Method(
    job="icce_ray.methods.heads.job",
    section="heads",
    version=3,
    needs_graph=True,
    unit="epochs",
    free_settings=frozenset({"checkpoint_interval_s"}),
)


def _fixed_neighbors(number: int) -> dict[str, Any]:
    """Exactly `number` neighbours for each image."""
    limits = {"min_neighbors": number, "max_neighbors": number}
    return {"similarity_threshold": None} | limits


METHODS: dict[str, Method] = {
    # arXiv 2511.16213, with our defaults; `preset: paper` has the paper's.
    "icce": _ICCE,
    # arXiv 2303.17896.
    "temi": replace(
        _ICCE,
        settings={
            "sample": {"duplicate_threshold": None},
            "neighbors": _fixed_neighbors(50),
            "heads": {
                "input_norm": "standardize",
                "rotate": False,
                "input_share": 1.0,
                "sinkhorn": False,
                "max_ce_weight": 0.0,
            },
            "consensus": {"methods": ("best_head",), "refine": False},
        },
    ),
    # The loss of arXiv 2005.12320 on frozen features.
    "scan": replace(
        _ICCE,
        settings={
            "sample": {"duplicate_threshold": None},
            "neighbors": _fixed_neighbors(20),
            "heads": {"loss": "scan", "input_norm": "standardize", "rotate": False, "input_share": 1.0},
            "consensus": {"methods": ("best_head",), "refine": False},
        },
    ),
}
