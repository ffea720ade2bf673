"""Make the corrected consensus: the labels with a person's corrections, and how far the clusterings agree with them.

An image that was trained on gets its new label here, and its near-duplicates follow it. The assign stage gives every
image that was moved or dropped its own label, whether it was trained on or not.

Corrections are carried over to another clustering of the same images, for example after images were added. The numbers
of clusters mean nothing there. A cluster is found again by the images that both clusterings have: the two are matched
one to one so that most images agree, and a match counts if it holds at least half of the old cluster.

Shape letters: N images trained on, K clusters.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from icce_ray.config import Config
from icce_ray.consensus.aligned_vote import ARRAYS, describe_clusters, measure_agreement
from icce_ray.consensus.best_consensus import derive_seeds
from icce_ray.consensus.hierarchy import HIERARCHY_NAME, build_hierarchy
from icce_ray.consensus.label_matrix import count_consensus
from icce_ray.consensus.other_runs import find_heads
from icce_ray.consensus.stored_label_matrix import open_heads
from icce_ray.corrections.stage import APPLIED_NAME, MOVED_NAME, Corrections, read_corrections
from icce_ray.embed.feature_matrix import load_features
from icce_ray.errors import InputError
from icce_ray.images.listing import LISTING_PREFIX, Listing
from icce_ray.metrics.contingency import anmi_from_counts, as_array, count_table, match_clusters
from icce_ray.sample.training_set import find_ids, training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, Folder

BASE_NAME = "base.parquet"
"""uri, cluster: the consensus before the corrections, so that a later run can tell which of its clusters is which."""
DROPPED = -1


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Write the files of a consensus, and APPLIED_NAME, BASE_NAME and MOVED_NAME.

    Returns the metrics of the consensus; num_labels (K and the new clusters), num_moved, num_dropped, num_merged,
    num_new, num_unknown (images of the file that are not in the collection), not_kept (clusters of an earlier
    clustering whose corrections could not be carried over). Raises InputError: the corrections were made for another
    clustering, which is no longer there.
    """
    inputs, output = context.inputs, context.output
    consensus = inputs["consensus"]
    labels_N = np.array(consensus.read_array("labels.npy"))
    image_ids_N = load_features(training_set(inputs)).image_ids
    given, not_kept = read_corrections(config.corrections), list[int]()
    base = pa.table({"uri": Listing(inputs["images"]).uris(image_ids_N), "cluster": labels_N})
    if given.made_for.consensus != consensus.identity:
        old = read_base(given, config.output)
        given, not_kept = carry_over(given, old, base, consensus.identity, config.num_clusters)
    moved = moved_images(given, inputs["images"])
    num_unknown = len(given.images) - len(moved)
    for count, what in (
        (num_unknown, "images of the corrections are not in this collection"),
        (len(not_kept), "clusters that were corrected are not in this clustering, so their corrections are left out"),
    ):
        if count:
            context.progress.note(f"{count:,} {what}")
    labels_N = correct_labels(labels_N, image_ids_N, moved, np.array(given.final_clusters()))

    heads = open_heads([inputs["method"], *find_heads(config.consensus.extra_runs, config.output, inputs["method"])])
    counts_KC = count_consensus(labels_N, heads, given.num_clusters)
    agreement = measure_agreement(labels_N, heads, counts_KC, seed=derive_seeds(config.seed)[0])
    metrics = dict(consensus.metrics) | {
        "anmi": anmi_from_counts(counts_KC, heads.offsets),
        "num_clusters": len(np.unique(labels_N[labels_N >= 0])),
        "num_labels": given.num_clusters,
        "num_moved": int((moved["cluster"].to_numpy() != DROPPED).sum()),
        "num_dropped": int((moved["cluster"].to_numpy() == DROPPED).sum()),
        "num_merged": sum(one.merge_into is not None for one in given.clusters),
        "num_new": sum(one.is_new for one in given.clusters),
        "num_unknown": num_unknown,
        "not_kept": not_kept,
    }
    for name, array_N in zip(("labels", *ARRAYS), (labels_N, *agreement), strict=True):
        output.write_array(f"{name}.npy", array_N)
    output.write_table(HIERARCHY_NAME, build_hierarchy(counts_KC, heads.offsets).to_table())
    clusters = describe_clusters(labels_N, agreement.agreement_N, agreement.second_choice_N, given.num_clusters)
    for cluster in clusters:
        cluster["name"] = given.names.get(cluster["cluster"])
    output.write_json("summary.json", consensus.read_json("summary.json") | metrics | {"clusters": clusters})
    output.write_bytes(APPLIED_NAME, given.model_dump_json(indent=1, exclude_none=False).encode())
    output.write_table(BASE_NAME, base)
    output.write_table(MOVED_NAME, moved)
    return metrics


def correct_labels(
    labels_N: npt.NDArray[Any], image_ids_N: npt.NDArray[np.int64], moved: pa.Table, final_K: npt.NDArray[Any]
) -> npt.NDArray[np.int32]:
    """The labels, 0..K-1 or -1 for noise, of images with ascending ids, with the images in `moved` (image_id, final
    cluster) moved and dropped, then clusters merged into `final_K`."""
    corrected_N = np.where(labels_N >= 0, final_K[labels_N], labels_N).astype(np.int32)
    ids, clusters = moved["image_id"].to_numpy(), moved["cluster"].to_numpy()
    rows = find_ids(image_ids_N, ids)
    corrected_N[rows[rows >= 0]] = clusters[rows >= 0]
    return corrected_N


def moved_images(given: Corrections, images: Artifact) -> pa.Table:
    """image_id, cluster (after merges; DROPPED) of the images that are in the collection, by ascending id."""
    final = given.final_clusters()
    wanted = {image.uri: DROPPED if image.cluster is None else final[image.cluster] for image in given.images}
    uris = pa.array(list(wanted), pa.string())
    ids, clusters = list[int](), list[int]()
    for name in images.part_names(LISTING_PREFIX) if wanted else ():
        table = images.read_table(name)
        found = table.filter(pc.is_in(table["uri"], uris)).select(["image_id", "uri"]).to_pydict()
        ids += found["image_id"]
        clusters += [wanted[uri] for uri in found["uri"]]
    return pa.table({"image_id": pa.array(ids, pa.int64()), "cluster": pa.array(clusters, pa.int32())})


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
    """The corrections of a clustering (uri, cluster) for a new one, of K clusters and with the identity `consensus`,
    and the corrected clusters that are not in it."""
    both = old.rename_columns(["uri", "old"]).join(new.rename_columns(["uri", "new"]), "uri", join_type="inner")
    table = count_table(both["old"].to_numpy(), both["new"].to_numpy(), given.made_for.num_clusters, num_clusters)
    matched: dict[Any, Any] = {None: None, **match_clusters(as_array(table))}
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
