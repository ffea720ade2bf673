"""Read a config: YAML, ``--set`` overrides, messages that name the file, the key, the value and what is allowed.
Settings that have no effect are refused."""

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from icce_ray.config.data_settings import PIXELS, EmbedConfig
from icce_ray.config.schema import Config
from icce_ray.config.strict_yaml import MAX_CHARACTERS, load_yaml
from icce_ray.errors import ConfigError
from icce_ray.methods import METHODS

MAX_SHOWN = 200
"""Characters of a value in a message."""
Model = TypeVar("Model", bound=BaseModel)
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


def load_config(
    path: str | Path | None,
    overrides: list[str] | None = None,
    *,
    base: dict[str, Any] | None = None,
    source: str = "the built-in config",
) -> Config:
    """Read a YAML config, or use `base` alone, whose settings the file may override; apply ``a.b=c`` overrides (values
    are YAML, later ones win) and validate the result. Raises ConfigError: names file, key, value and what is allowed
    for every problem found."""
    source = str(path) if path is not None else source
    given = read_yaml(Path(path)) if path is not None else {}
    data: dict[str, Any] = dict(base or {}) | given
    for override in overrides or []:
        apply_override(data, override)
        apply_override(given, override)
    config = build_config(data, source)
    if problems := unused_settings(config, given):
        raise _refusal(source, problems)
    return config


def build_config(data: dict[str, Any], source: str) -> Config:
    """Validate settings; `source` names them in messages."""
    return validate(Config, data, source)


def validate(model: type[Model], data: dict[str, Any], source: str) -> Model:
    """Validate `data` as a `model`. Raises ConfigError: names `source`, key, value and what is allowed for every
    problem found."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_describe(problem, model) for problem in error.errors() if not _is_of_other_type(problem)]
        raise _refusal(source, list(dict.fromkeys(problems))) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the settings in a YAML file. Raises ConfigError: the file cannot be read or holds no settings."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)  # /dev/zero would never end
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file") from None
    except (OSError, ValueError) as error:  # also a path that holds a NUL
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        data = load_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: holds {type(data).__name__}, not settings; at least images.uri, num_clusters and output"
        )
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Put the value of ``a.b=c`` into `data`. Sections on the way are copied, not changed."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: write it as section.key=value")
    try:
        value = load_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--set {override}: the value is {error}") from None
    put(data, key.strip(), value)


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the setting with the dotted name `key`. Sections on the way are copied, not changed."""
    *sections, last = key.split(".")
    node = data
    for section in sections:
        child = node.get(section)
        node[section] = dict(child) if isinstance(child, dict) else {}
        node = node[section]
    node[last] = value


def _refusal(source: str, problems: list[str]) -> ConfigError:
    return ConfigError(f"{source}: " + (problems[0] if len(problems) == 1 else "\n  ".join(["", *problems])))


def _is_of_other_type(problem: Any) -> bool:
    """Whether this says only that a path is no list of paths, or the other way round."""
    is_list = isinstance(problem.get("input"), (list, tuple))
    return "[" in str(*problem["loc"][-1:]) and problem["type"] == ("string_type" if is_list else "tuple_type")


def _describe(problem: Any, model: type[BaseModel]) -> str:
    # Without the names that pydantic gives to the types of a union, such as "tuple[str, ...]".
    location = [
        str(part) for part in problem["loc"] if not re.search(r"\[|_type$|^(str|int|float|constrained-.*)$", str(part))
    ]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], model)
        close = difflib.get_close_matches(location[-1], known, n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else f"known here: {', '.join(known)}"
        section, _, setting = location[-1].partition(".")
        if setting and section in known:
            remedy = f"write {setting} below {section}"
        return f"{key}: unknown setting; {remedy}"
    if problem["type"] == "missing":
        return f"{key}: not given, and it has no default"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem.get("input")
    if not key:
        return message
    if problem["type"] == "model_type":
        return f"{key}: this is a section; write its settings below it, such as {location[-1]}: {{setting: value}}"
    if problem["type"] in ("int_parsing", "float_parsing") and (meant := _meant(given)):
        message = f"write {meant}"
    if isinstance(given, (dict, list)) or location[0] == "storage" or "@" in str(given):  # may be a secret
        return f"{key}: {message}"
    shown = repr(given)
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
    return f"{key}: {shown} is not usable: {message}"


def _meant(given: str) -> str:
    """The spelling of a number, or of nothing, that was written as text; empty if none is known."""
    text = given.strip().lower()
    found = re.fullmatch(r"([\d_.]+(?:e\d{1,2})?) ?(?:([kmgt])(i?)b?|(b)|(%))?", text)
    if text in ("none", "nil", "auto"):
        return "auto" if text == "auto" else "null"
    try:
        if found is None:
            return ""
        number = float(found[1]) * (1024 if found[3] else 1000) ** (" kmgt".index(found[2]) if found[2] else 0)
        return f"{number / 100:g}" if found[5] else str(int(number)) if number.is_integer() else ""
    except ValueError:
        return ""


def _known_keys(sections: list[str], root: type[BaseModel]) -> list[str]:
    model: Any = root
    for section in sections:
        field = model.model_fields.get(section)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _is_not(*methods: str) -> Callable[[Config], bool]:
    return lambda config: not set(methods) & set(config.methods)


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
    (
        _LABEL_COLUMNS,
        lambda c: not str(c.evaluate.labels).endswith((".csv", ".parquet")),
        "evaluate.labels is no .csv or .parquet file",
    ),
)
"""Settings or sections, when they have no effect, and why. `cluster_count` is not here: a config may keep it while
`num_clusters` is a number, to go back to `auto`."""


def unused_settings(config: Config, given: Mapping[str, Any]) -> list[str]:
    """A message for each setting in `given` (by section) that has no effect in this config and isn't the default."""
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
