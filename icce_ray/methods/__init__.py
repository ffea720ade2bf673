"""The methods: ways to make a label matrix, H clusterings of the same N images (docs/METHOD.md, "Methods").

All later stages need only that matrix, so they work for every method. To add one, write a folder here whose ``job.py``
has ``run(config, context)`` and writes `icce_ray.methods.clusterings.Clusterings`, a section of the config for its
settings, and an entry in the table below.

This module imports nothing heavy, since the config is checked against it.
"""

from collections.abc import Callable, Mapping
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
    """Whether it takes the neighbour graph as an input."""
    unit: str
    """Unit of its progress."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Its own defaults, by section; the config overrides them."""
    free_settings: frozenset[str] = frozenset()
    """Settings of its section that do not affect its result."""
    depends_on_name: bool = False
    """Whether its result depends on its name too: several methods share the section."""
    finds_num_clusters: Callable[[Any], bool] = lambda section: False
    """Whether it finds the number of clusters itself, given its section of the config. If so, `num_clusters` is `auto`,
    and its metrics hold the number."""
    has_check: bool = False
    """Whether its job has ``check(config)``, which raises a UserError before any work starts."""


_ICCE = Method(
    job="icce_ray.methods.heads.job",
    section="heads",
    version=5,
    needs_graph=True,
    unit="epochs",
    free_settings=frozenset({"checkpoint_interval_s"}),
)


def _best_head(num_neighbors: int, **heads: Any) -> Method:
    """The heads with other settings, on exactly `num_neighbors` neighbours of each image; the best head is kept."""
    neighbors = {"similarity_threshold": None, "min_neighbors": num_neighbors, "max_neighbors": num_neighbors}
    settings: dict[str, dict[str, Any]] = {
        "sample": {"duplicate_threshold": None},
        "neighbors": neighbors,
        "heads": {"input_norm": "standardize", "rotate": False, "input_share": 1.0} | heads,
        "consensus": {"methods": ("best_head",), "refine": False, "recombine": False, "relabel": False},
    }
    return replace(_ICCE, settings=settings)


def _conventional(max_images: int, settings: Mapping[str, Mapping[str, Any]] = {}, **changes: Any) -> Method:
    """A clusterer of scikit-learn's, by default on at most `max_images`."""
    return Method(
        job="icce_ray.methods.conventional.job",
        section="conventional",
        version=1,
        needs_graph=False,
        unit="steps",
        settings={"sample": {"max_images": max_images}, **settings},
        depends_on_name=True,
        has_check=True,
        **changes,
    )


METHODS: dict[str, Method] = {
    # arXiv 2511.16213, with our defaults; `preset: paper` has the paper's.
    "icce": _ICCE,
    # arXiv 2303.17896.
    "temi": _best_head(50, sinkhorn=False, max_ce_weight=0.0),
    # The loss of arXiv 2005.12320 on frozen features.
    "scan": _best_head(20, loss="scan"),
    # arXiv 2406.07236.
    "turtle": Method(
        job="icce_ray.methods.turtle.job",
        section="turtle",
        version=4,
        needs_graph=False,
        unit="steps",
        settings={"consensus": {"methods": ("best_head",), "refine": False, "relabel": False}},
        free_settings=frozenset({"checkpoint_interval_s"}),
    ),
    # arXiv 2008.10312. The result is the start with the lowest inertia; the others say how stable it is.
    "kmeans": Method(
        job="icce_ray.methods.kmeans.job",
        section="kmeans",
        version=1,
        needs_graph=False,
        unit="iterations",
        settings={
            "sample": {"duplicate_threshold": None},
            "consensus": {"methods": ("best_head",), "refine": False, "relabel": False},
        },
    ),
    # arXiv 2406.02465 compares these on frozen features.
    "agglomerative": _conventional(20_000, finds_num_clusters=lambda section: section.distance_threshold is not None),
    "spectral": _conventional(10_000, {"conventional": {"representation": "raw"}}),
    "affinity_propagation": _conventional(5_000, finds_num_clusters=lambda section: True),
    "hdbscan": _conventional(50_000, finds_num_clusters=lambda section: True),
    "gmm": _conventional(100_000),
}
