"""The ``corrections`` stage: the consensus with a person's corrections. A run has it if there are any.

`icce-ray apply` keeps the corrections of a run in its output, under a name that depends on the settings that make the
clusters. So the next run with these settings has them too, also after images were added, and a run with other settings
has not.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from icce_ray.config import Config
from icce_ray.corrections.corrections_file import read_bytes, read_corrections
from icce_ray.stage import Settings, Stage
from icce_ray.store import Artifact, Folder, fingerprint

KEPT, NONE = "kept", "none"
KEPT_FOLDER = "corrections_kept"
APPLIED_NAME = "applied.json"
"""The corrections as they were applied: those of the file, or carried over to this consensus."""
MOVED_NAME = "images.parquet"
"""image_id, cluster: images that were moved, or dropped (-1)."""
OTHER_SETTINGS = {"output", "corrections", "resources", "storage", "report", "evaluate"}
"""Settings that don't make the clusters."""

C = TypeVar("C", bound=Config)


def kept_name(config: Config) -> str:
    """Name of the file in KEPT_FOLDER with the corrections of runs with these settings."""
    return fingerprint("kept", 1, config.model_dump(mode="json", exclude=OTHER_SETTINGS), {}) + ".json"


def with_kept_corrections(config: C) -> C:
    """`config` with the corrections that the output keeps for its settings, or none."""
    if config.corrections != KEPT:
        return config
    folder, name = Folder.at(config.output) / KEPT_FOLDER, kept_name(config)
    return config.model_copy(update={"corrections": folder.file_uri(name) if folder.exists(name) else NONE})


def has_corrections(config: Config) -> bool:
    return config.corrections not in (KEPT, NONE)


def consensus_of(inputs: Mapping[str, Artifact]) -> Artifact:
    """The consensus that the stages after it build on: the corrected one if there is one."""
    return inputs.get("corrections", inputs["consensus"])


def num_clusters_of(config: Config, inputs: Mapping[str, Artifact]) -> int:
    """K, with the clusters that were split off."""
    return int(inputs["corrections"].metrics["num_labels"]) if "corrections" in inputs else config.num_clusters


def moved_clusters(inputs: Mapping[str, Artifact]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Ids of the images that a person moved or dropped, ascending, and their clusters; none without corrections."""
    if "corrections" not in inputs:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
    table = inputs["corrections"].read_table(MOVED_NAME)
    return table["image_id"].to_numpy(), table["cluster"].to_numpy()


def applied_corrections(inputs: Mapping[str, Artifact]) -> dict[str, Any] | None:
    """The corrections of a run as JSON; None if it has none."""
    if "corrections" not in inputs:
        return None
    applied: dict[str, Any] = json.loads(inputs["corrections"].read_bytes(APPLIED_NAME))
    return applied


def _settings(config: Config) -> Settings:
    content = hashlib.sha256(read_bytes(config.corrections)).hexdigest()
    return {"content": content, "seed": config.seed, "extra_runs": config.consensus.extra_runs}


CORRECTIONS = Stage(
    "corrections",
    "icce_ray.corrections.apply_corrections",
    1,
    ("images", "embed", "sample", "method", "consensus"),
    _settings,
    check=lambda config: read_corrections(config.corrections),
)
