"""Settings that have no effect in a config, which are refused."""

from collections.abc import Callable, Mapping
from typing import Any

from icce_ray.config.data_settings import PIXELS, EmbedConfig
from icce_ray.config.schema import Config
from icce_ray.methods import METHODS

_EMBEDDING = tuple(f"embed.{name}" for name in EmbedConfig.model_fields if name != "max_error_rate")
_NETWORK = ("embed.weights", "embed.features", "embed.precision", "embed.compile")
_TEACHER = (
    "heads.sinkhorn", "heads.sinkhorn_iterations", "heads.balance", "heads.teacher_temperature", "heads.beta",
    "heads.max_ce_weight", "heads.prior_momentum",
)  # fmt: skip
CONVENTIONAL = tuple(name for name, method in METHODS.items() if method.section == "conventional")
_AGGLOMERATIVE = ("conventional.linkage", "conventional.distance_threshold")
_LLOYD = ("kmeans.num_iterations", "kmeans.tolerance")
_MINI_BATCH = ("kmeans.num_epochs", "kmeans.batch_size")
_LABEL_COLUMNS = ("evaluate.label_column", "evaluate.uri_column")


def _is_not(*methods: str) -> Callable[[Config], bool]:
    return lambda config: not set(methods) & set(config.methods)


def _has_no_label_table(config: Config) -> bool:
    labels = config.evaluate.labels
    return labels is None or not labels.endswith((".csv", ".parquet"))


RULES: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str], ...] = (
    (_EMBEDDING, lambda c: c.embeddings.uri is not None, "embeddings are ready-made, so no image is embedded"),
    (("images.bytes_column",), lambda c: c.embeddings.uri is not None, "embeddings are ready-made"),
    (("embeddings.column",), lambda c: c.embeddings.uri is None, "no embeddings are given"),
    (_NETWORK, lambda c: c.embed.backbone == PIXELS, "the backbone is pixels"),
    (("embed.grayscale",), lambda c: c.embed.backbone != PIXELS, "only the backbone pixels has it"),
    (_TEACHER, lambda c: c.heads.loss == "scan", "SCAN's loss does not use it"),
    (("heads.scan_entropy_weight",), lambda c: c.heads.loss != "scan", "only SCAN's loss uses it"),
    (("heads.sinkhorn_iterations", "heads.balance"), lambda c: not c.heads.sinkhorn, "heads.sinkhorn is false"),
    (("kmeans",), _is_not("kmeans"), "only the method kmeans uses it"),
    (_LLOYD, lambda c: c.kmeans.algorithm != "lloyd", "kmeans.algorithm is mini_batch"),
    (_MINI_BATCH, lambda c: c.kmeans.algorithm != "mini_batch", "kmeans.algorithm is lloyd"),
    (("conventional",), _is_not(*CONVENTIONAL), f"only the methods {', '.join(CONVENTIONAL)} use it"),
    (_AGGLOMERATIVE, _is_not("agglomerative"), "only agglomerative uses it"),
    (("conventional.preference",), _is_not("affinity_propagation"), "only affinity_propagation uses it"),
    (("conventional.min_cluster_size",), _is_not("hdbscan"), "only hdbscan uses it"),
    (("conventional.num_neighbors",), _is_not("spectral"), "only spectral uses it"),
    (("conventional.covariance",), _is_not("gmm"), "only gmm uses it"),
    (_LABEL_COLUMNS, _has_no_label_table, "evaluate.labels is no .csv or .parquet file"),
)
"""Settings or sections, when they have no effect, and why. `cluster_count` is not here: a config may keep it while
`num_clusters` is a number, to go back to `auto`."""


def unused_settings(config: Config, given: Mapping[str, Any]) -> list[str]:
    """What is wrong with each setting of `given`, by section, that differs from its default and has no effect."""
    return [
        f"{name}: {value!r} has no effect: {reason}; leave it out"
        for names, applies, reason in RULES
        if applies(config)
        for name, value in _changed(names, config, given)
    ]


def _changed(names: tuple[str, ...], config: Config, given: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The settings among `names` that are given and differ from the default."""
    found = []
    for name in names:
        section, _, setting = name.partition(".")
        written, values = given.get(section), getattr(config, section)
        for key in [setting] if setting else list(type(values).model_fields):
            default = type(values).model_fields[key].default
            if isinstance(written, Mapping) and key in written and getattr(values, key) != default:
                found.append((f"{section}.{key}", getattr(values, key)))
    return found
