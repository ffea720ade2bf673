"""The ``corrections`` stage: the consensus with a person's corrections. A run has it if there are any.

``corrections.json`` says what a person changed about the clusters, as the page saves it. It holds a final state, not a
sequence of steps, so the order of the changes does not matter. Clusters keep their numbers: one that was merged is
empty afterwards, and new ones get the numbers from K on.

`icce-ray apply` keeps the corrections of a run in its output, under a name that depends on the settings that make the
clusters. So the next run with these settings has them too, also after images were added, and a run with other settings
has not.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from icce_ray.config import Config
from icce_ray.errors import InputError
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
MAX_CLUSTERS = 1_000_000


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


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MadeFor(_Record):
    """The clustering that the numbers belong to."""

    consensus: str
    """Identity of the consensus artifact."""
    num_clusters: int
    """K of that consensus."""
    assign: str | None = None
    """Fingerprint of its assignments."""
    corrections: str | None = None
    """Fingerprint of the artifact of corrections that the page showed, if there was one."""


class ClusterChange(_Record):
    cluster: int
    name: str | None = None
    merge_into: int | None = None
    is_new: bool = False
    """Split off: it has no images but those that are moved to it."""


class ImageChange(_Record):
    uri: str
    cluster: int | None
    """None: the image is dropped; it becomes noise."""
    image_id: int | None = None
    """For readers of the file; images are found by their URI."""


class Corrections(_Record):
    format: Literal[1]
    made_for: MadeFor
    clusters: tuple[ClusterChange, ...] = ()
    images: tuple[ImageChange, ...] = ()

    @property
    def num_clusters(self) -> int:
        """K and the new clusters; their numbers are below it."""
        return max([self.made_for.num_clusters, *(one.cluster + 1 for one in self.clusters if one.is_new)])

    @property
    def named_clusters(self) -> set[int]:
        """All clusters that a change names."""
        found = [one.cluster for one in self.clusters] + [one.merge_into for one in self.clusters]
        found += [image.cluster for image in self.images]
        return {cluster for cluster in found if cluster is not None}

    @property
    def names(self) -> dict[int, str]:
        return {one.cluster: one.name for one in self.clusters if one.name}

    def final_clusters(self) -> list[int]:
        """For each cluster the one that it is part of after merges. Raises InputError: merges in a circle."""
        into = {one.cluster: one.merge_into for one in self.clusters if one.merge_into is not None}
        final = []
        for cluster in range(self.num_clusters):
            place, seen = cluster, {cluster}
            while place in into:
                place = into[place]
                if place in seen:
                    raise InputError(f"corrections: the merges of clusters {sorted(seen)} form a circle")
                seen.add(place)
            final.append(place)
        return final


def read_corrections(uri: str) -> Corrections:
    """Read and check a file. Raises InputError: no such file, another format, or a cluster that does not exist."""
    try:
        data = json.loads(read_bytes(uri))
        found = Corrections.model_validate(data)
        if found.num_clusters > MAX_CLUSTERS:
            raise ValueError(f"{found.num_clusters:,} clusters; at most {MAX_CLUSTERS:,} are possible")
    except (ValueError, RecursionError) as error:
        what = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, what['loc']))}: {what['msg']}" if what else str(error)
        raise InputError(f"corrections: {uri} is not a file that the page saved: {reason}") from None
    known = set(range(found.made_for.num_clusters)) | {one.cluster for one in found.clusters if one.is_new}
    wrong = sorted(found.named_clusters - known)
    if wrong:
        raise InputError(
            f"corrections: {uri} names cluster {wrong[0]}; there are 0 to {found.made_for.num_clusters - 1} and "
            "the new ones in the file"
        )
    found.final_clusters()
    return found


def read_bytes(uri: str) -> bytes:
    """Content of a file. Raises InputError: it cannot be read."""
    folder, _, name = uri.rpartition("/")
    try:
        place = Folder.at(folder or ".")
        if not place.exists(name):  # nor a device, which would never end
            raise FileNotFoundError("there is no such file")
        return place.read_bytes(name)
    except OSError as error:
        raise InputError(f"corrections: {uri} cannot be read: {error}") from None
