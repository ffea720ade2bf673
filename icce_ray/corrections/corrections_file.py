"""``corrections.json``: what a person changed about the clusters, as the page saves it.

It holds a final state, not a sequence of steps, so the order of the changes does not matter. Clusters keep their
numbers: one that was merged is empty afterwards, and new ones get the numbers from K on.
"""

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from icce_ray.errors import InputError
from icce_ray.store import Folder

MAX_CLUSTERS = 1_000_000


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
