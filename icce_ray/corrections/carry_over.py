"""Carry corrections over to another clustering of the same images, for example after images were added.

The numbers of clusters mean nothing there. A cluster is found again by the images that both clusterings have: the two
are matched one to one so that most images agree, and a match counts if it holds at least half of the old cluster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.corrections.corrections_file import Corrections
from icce_ray.errors import InputError
from icce_ray.metrics.matched_clusters import match_clusters
from icce_ray.store import Artifact, Folder


def read_base(given: Corrections, output: str) -> pa.Table:
    """uri, cluster: the clustering that the corrections were made for. Raises InputError: it is no longer in the
    output."""
    root, made_for = Folder.at(output), given.made_for
    for stage, fingerprint, prefix in (
        ("corrections", made_for.corrections, "base.parquet"),
        ("assign", made_for.assign, "assignments/"),
    ):
        artifact = Artifact.find(root / stage / fingerprint) if fingerprint else None
        if artifact is not None:
            names = artifact.part_names(prefix)
            return pa.concat_tables([artifact.read_table(name).select(["uri", "cluster"]) for name in names])
    raise InputError(
        f"corrections: they were made for another clustering ({made_for.consensus}), which is not in {output}; set "
        "corrections: none to run without them"
    )


def carry_over(
    given: Corrections, old: pa.Table, new: pa.Table, consensus: str, num_clusters: int
) -> tuple[Corrections, list[int]]:
    """The corrections for a new clustering, and the corrected clusters that are not in it.

    Args:
        old: uri, cluster: the clustering that they were made for.
        new: uri, cluster: the clustering that they are wanted for.
        consensus: identity of the new one.
        num_clusters: K of the new one.
    """
    both = old.rename_columns(["uri", "old"]).join(new.rename_columns(["uri", "new"]), "uri", join_type="inner")
    old_n, new_n = both["old"].to_numpy(), both["new"].to_numpy()
    has_both = (old_n >= 0) & (new_n >= 0)
    table = np.zeros((given.made_for.num_clusters, num_clusters), dtype=np.int64)
    np.add.at(table, (old_n[has_both], new_n[has_both]), 1)
    matched: dict[Any, Any] = {None: None, **match_clusters(table)}
    new_ones = [one.cluster for one in given.clusters if one.is_new]
    matched |= {cluster: num_clusters + place for place, cluster in enumerate(new_ones)}
    clusters = [
        one.model_copy(update={"cluster": matched[one.cluster], "merge_into": matched.get(one.merge_into)})
        for one in given.clusters
        if one.cluster in matched
    ]
    images = [
        image.model_copy(update={"cluster": matched[image.cluster]})
        for image in given.images
        if image.cluster in matched
    ]
    made_for = given.made_for.model_copy(
        update={"consensus": consensus, "num_clusters": num_clusters, "assign": None, "corrections": None}
    )
    carried = given.model_copy(update={"made_for": made_for, "clusters": tuple(clusters), "images": tuple(images)})
    return carried, sorted(given.named_clusters - matched.keys())
