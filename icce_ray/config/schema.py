"""Every setting, declared once, with its meaning under it, and the presets.

A config is YAML; three lines do for the common case::

    images: {uri: /data/photos}
    num_clusters: 10
    output: /data/clusters

Unknown keys, wrong types and impossible combinations are refused before any work starts. ``method`` and ``preset`` fill
in settings that the file leaves open; a setting that is given always wins. ``resources`` never changes a result.
"Paper" marks a default that differs from the recipe of arXiv 2511.16213, which ``preset: paper`` restores
(docs/METHOD.md, "Paper recipe and defaults").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, field_validator, model_validator

from icce_ray.config.data_settings import (
    EmbedConfig,
    EmbeddingsConfig,
    EvaluateConfig,
    ImagesConfig,
    ReportConfig,
    SampleConfig,
)
from icce_ray.config.machine_settings import ResourcesConfig, StorageConfig
from icce_ray.config.method_settings import (
    AssignConfig,
    ClassifierConfig,
    ClusterCountConfig,
    ConsensusConfig,
    ConventionalConfig,
    HeadsConfig,
    KMeansConfig,
    NeighborsConfig,
    TurtleConfig,
)
from icce_ray.config.section import Place, PositiveInt, Section, Seed
from icce_ray.errors import ConfigError
from icce_ray.methods import METHODS

AUTO: Literal["auto"] = "auto"

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # ICCE as published (arXiv 2511.16213; docs/METHOD.md, "Paper recipe and defaults").
    "paper": {
        "sample": {"duplicate_threshold": None},
        "neighbors": {"similarity_threshold": 0.3, "min_neighbors": 50, "max_neighbors": None, "center": False},
        "heads": {
            "num_heads": 50,
            "num_epochs": 400,
            "batch_size": 1024,
            "learning_rate": 1e-4,
            "warmup_epochs": 20,
            "input_norm": "batch_norm",
            "rotate": False,
            "input_share": 1.0,
            "balance": 1.0,
            "teacher_momentum": 0.996,
        },
        "consensus": {"methods": ("mcla", "cspa"), "refine": False, "recombine": False, "relabel": False},
    }
}


class ClusteringConfig(Section):
    """Everything that determines a clustering of given features."""

    model_config = ConfigDict(serialize_by_alias=True)

    given_num_clusters: int | Literal["auto"] = Field(alias="num_clusters")
    """Number of clusters (K). `auto`: found by the method if it can (`affinity_propagation`, `hdbscan`, `agglomerative`
    with a distance threshold), else chosen without labels, as set by `cluster_count`."""
    cluster_count: ClusterCountConfig = ClusterCountConfig()
    """Used if `num_clusters` is `auto`."""
    method: str | tuple[str, ...] = "icce"
    """How the images are clustered: `icce` (arXiv 2511.16213), `temi` (arXiv 2303.17896), or `scan`, the loss of arXiv
    2005.12320 on frozen features; `turtle` (arXiv 2406.07236), which uses all feature sets, where the others use the
    first; `kmeans` (arXiv 2008.10312); or one of scikit-learn's clusterers, set by `conventional`: `agglomerative`,
    `spectral`, `affinity_propagation`, `hdbscan`, `gmm`. It fills in the settings that it needs and the config leaves
    open. A list, such as `[icce, scan]`, runs each over the same sample and makes one consensus of all, in which every
    method has the same weight."""
    preset: Literal["paper"] | None = None
    """`paper`: every constant as the ICCE paper has it, where the config leaves it open. Not set: our defaults, which
    were measured to be better; docs/METHOD.md lists where they differ."""
    seed: Seed = 0
    """Seed of every random draw. The same config and seed give the same labels on the same kind of machine."""
    sample: SampleConfig = SampleConfig()
    neighbors: NeighborsConfig = NeighborsConfig()
    heads: HeadsConfig = HeadsConfig()
    turtle: TurtleConfig = TurtleConfig()
    kmeans: KMeansConfig = KMeansConfig()
    conventional: ConventionalConfig = ConventionalConfig()
    consensus: ConsensusConfig = ConsensusConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    assign: AssignConfig = AssignConfig()

    @property
    def num_clusters(self) -> int:
        """K. Raises ConfigError: it is `auto` and has not been chosen yet."""
        if self.given_num_clusters == AUTO:
            raise ConfigError("num_clusters: 'auto' is chosen by a run; a number is needed here")
        return self.given_num_clusters

    @property
    def is_auto(self) -> bool:
        """Whether the number of clusters is still to be chosen."""
        return self.given_num_clusters == AUTO

    @property
    def finds_num_clusters(self) -> bool:
        """Whether the method finds the number of clusters itself. With several methods, none decides for the others."""
        return isinstance(self.method, str) and self._finds_num_clusters(self.method)

    def _finds_num_clusters(self, method: str) -> bool:
        return METHODS[method].finds_num_clusters(getattr(self, METHODS[method].section))

    @property
    def needed_images(self) -> tuple[int, str]:
        """Smallest number of images that the clusters can be made of, and what asks for it: the setting and what it
        asks for."""
        if self.method == "hdbscan":
            size = self.conventional.min_cluster_size
            return 2 * size, f"conventional.min_cluster_size: 2 clusters of {size} images"
        asked, number, setting = self.cluster_count, 2, "num_clusters"
        if not self.is_auto:
            number = self.num_clusters
        elif not self.finds_num_clusters:
            limit = "min_clusters" if asked.max_clusters is None else "max_clusters"
            number, setting = getattr(asked, limit), f"cluster_count.{limit}"
        return number, f"{setting}: {number} clusters"

    def with_num_clusters(self, num_clusters: int) -> Self:
        """The same with this K."""
        return self.model_copy(update={"given_num_clusters": num_clusters})

    @property
    def methods(self) -> tuple[str, ...]:
        """`method` as a tuple."""
        return (self.method,) if isinstance(self.method, str) else self.method

    def with_methods(self, methods: Iterable[str]) -> Self:
        """The same with several methods, see `method`."""
        return type(self).model_validate(self.model_dump(exclude_unset=True) | {"method": tuple(methods)})

    def of_method(self, method: str) -> Self:
        """The same with one method, which fills in what the config leaves open, over the same sample."""
        given = self.model_dump(exclude_unset=True) | {"method": method, "sample": self.sample}
        if self._finds_num_clusters(method):
            given["num_clusters"] = AUTO
        return type(self).model_validate(given)

    def to_record(self) -> dict[str, Any]:
        """JSON that makes the same config again. With several methods it holds what was given and no more: each method
        fills in what is left open."""
        return self.model_dump(mode="json", exclude_unset=len(self.methods) > 1)

    def with_extra_runs(self, runs: Iterable[str]) -> Self:
        """The same with the clusterings of other runs in the consensus."""
        extra = tuple(dict.fromkeys((*self.consensus.extra_runs, *runs)))
        given = self.consensus.model_dump(exclude_unset=True) | {"extra_runs": extra}
        return self.model_copy(update={"consensus": ConsensusConfig.model_validate(given)})

    @field_validator("given_num_clusters", mode="wrap")
    @classmethod
    def _number_or_auto(cls, value: Any, handler: Any) -> int | Literal["auto"]:
        # The union's own messages would name "num_clusters.int" and "num_clusters.literal['auto']".
        if isinstance(value, bool):
            raise ValueError("true and false are not allowed here")
        return AUTO if value == AUTO else TypeAdapter(PositiveInt).validate_python(value)

    @model_validator(mode="after")
    def _check_number(self) -> Self:
        if self.finds_num_clusters and not self.is_auto:
            given, threshold = self.num_clusters, self.conventional.distance_threshold
            if self.method == "agglomerative":
                raise ValueError(
                    f"num_clusters is {given}, but with conventional.distance_threshold: {threshold} the method finds "
                    "the number itself; write num_clusters: auto, or leave the threshold out"
                )
            raise ValueError(
                f"num_clusters is {given}, but method: {self.method} finds the number itself; write num_clusters: "
                "auto, or take a method that is given the number, such as agglomerative or spectral"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Fill in what the method, then the preset, sets where the config leaves it open."""
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        method, preset = data.get("method", "icce"), data.get("preset")
        methods = method if isinstance(method, (list, tuple)) else [method]
        if not all(isinstance(name, (str, int, float, type(None))) for name in (*methods, preset)):
            raise ValueError("method and preset: give names, such as method: icce")
        if preset in METHODS:
            remedy = "leave preset out" if preset == "icce" else f"write method: {preset}"
            raise ValueError(f"preset: {preset!r} is a method, not a preset; {remedy}")
        unknown = [name for name in methods if name not in METHODS]
        if unknown or not methods:
            problem = f"{unknown[0]!r} is unknown" if unknown else "the list is empty"
            raise ValueError(f"method: {problem}; the methods are {', '.join(METHODS)}")
        if len(set(methods)) < len(methods):
            raise ValueError(f"method: {', '.join(methods)}: each method can be named once")
        if len(methods) > 1:
            if preset is not None:
                raise ValueError(f"preset: {preset!r} belongs to a single method, icce; leave one of them out")
            return filled  # each method fills in its own settings when it is run, see `of_method`
        method = filled["method"] = methods[0]
        if preset is not None and method != "icce":
            raise ValueError(f"preset: {preset!r} belongs to method: icce, not to {method!r}; leave one of them out")
        for section, settings in {**METHODS[method].settings, **PRESETS.get(preset or "", {})}.items():
            given = filled.get(section) or {}
            if isinstance(given, dict):
                filled[section] = {**settings, **given}
        return filled


class Config(ClusteringConfig):
    """All settings of a run."""

    output: Place
    """Folder or URI for all artifacts. Runs with the same output share embeddings and graphs."""
    images: ImagesConfig = ImagesConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    embed: EmbedConfig = EmbedConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    corrections: Literal["kept", "none"] | Place = "kept"
    """Manual changes to the clusters: a corrections.json that the page saved. `kept`: those that `icce-ray apply` kept
    in the output for a run with the same settings, if any; new images don't matter. `none`: none."""
    report: ReportConfig = ReportConfig()
    storage: StorageConfig = StorageConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @field_validator("images", "embeddings", mode="before")
    @classmethod
    def _place_alone(cls, value: Any) -> Any:
        """``images: /data/photos`` is short for ``images: {uri: /data/photos}``."""
        return {"uri": value} if isinstance(value, (str, list, tuple)) else value

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.given_num_clusters == 1:
            raise ValueError("num_clusters: 1 puts all images into one cluster, which needs no run; ask for at least 2")
        if (self.images.uri is None) == (self.embeddings.uri is None):
            given = "neither is" if self.images.uri is None else "both are"
            raise ValueError(f"{given} given: name the input with either images.uri or embeddings.uri")
        if self.embeddings.uri is not None and self.evaluate.labels == "folder":
            raise ValueError("evaluate.labels is 'folder', but ready-made embeddings have no folders: name a file")
        return self
