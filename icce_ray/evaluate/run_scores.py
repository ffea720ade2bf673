"""The evaluate stage: scores without labels, and how well the clusters match the true labels if there are any. Only the
report depends on it.

Shapes: N images trained on, n images, D dimensions, H heads.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from icce_ray.config import Config
from icce_ray.corrections.stage import consensus_of
from icce_ray.embed.feature_matrix import load_features
from icce_ray.evaluate.estimated_accuracy import MAX_IMAGES, estimate_accuracy
from icce_ray.evaluate.label_files import has_names
from icce_ray.evaluate.labels import TrueLabels, load_labels, named_images
from icce_ray.evaluate.method_clusterings import describe, method_clusterings, nmi_matrix
from icce_ray.images.listing import Listing
from icce_ray.methods.clusterings import LABELS_NAME, read_losses
from icce_ray.metrics.label_free_scores import label_free_scores, project_pca, project_umap
from icce_ray.metrics.true_label_scores import (
    clustering_accuracy,
    contingency_table,
    evaluate_with_noise,
    match_to_classes,
)
from icce_ray.random_numbers import id_hashes, sampled_rows
from icce_ray.runtime.progress import QUIET, Progress
from icce_ray.sample.training_set import training_rows_of, training_set
from icce_ray.sample.unit_features import prepare
from icce_ray.stage import StageContext
from icce_ray.store import Artifact

METRICS_NAME = "metrics.json"
ASSIGNMENTS = "assignments/"
MAX_SCORED = 2_000_000
"""If there are more images, a sample of about this size is compared with the true labels; with more names in a label
file, at least half as many."""
SAMPLED_IMAGES = 2 * MAX_IMAGES
"""Images that are read for the estimate, since some of them may be noise."""
TRUE_LABELS_NAME = "labels.parquet"
"""image_id, label: the true label of each image, if labels were given; the report shows it."""
METHODS_NAME = "method_clusterings.npy"
"""With several methods: one clustering of each, (M, N) int32; the report shows them."""


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Score the clusters without labels, and compare the assignments with the true labels.

    Returns estimated_accuracy, silhouette_pca, generalization, and silhouette_umap if it was asked for: made without
    labels, from a sample; each is left out where it is not defined. With labels also acc, nmi (geometric),
    nmi_arithmetic, ari, many_to_one over all embedded images, or over num_labelled if not all have labels or there are
    more than MAX_SCORED, and if some of them are noise num_noise and acc_without_noise; head_acc_mean, head_acc_best
    (by the true labels), head_acc_lowest_loss over the images of the consensus; acc_high_agreement and
    acc_low_agreement, over the halves of these by agreement; num_classes. Raises InputError: labels that cannot be
    used.
    """
    inputs = context.inputs
    labels_N = np.array(consensus_of(inputs).read_array("labels.npy"))
    features = load_features(training_set(inputs))
    sampled = sampled_rows(len(labels_N), SAMPLED_IMAGES, config.seed)
    estimate = estimate_accuracy(features.matrix[sampled], labels_N[sampled], seed=config.seed)
    score = _scorer(features.matrix, config)
    metrics = {name: value for name, value in score(labels_N).items() if value is not None}
    if estimate is not None:
        metrics["estimated_accuracy"] = estimate[0]
    classes_N = None
    if config.evaluate.labels is not None:
        labels, assigned = _labelled_assignments(config, inputs)
        names = pa.array(labels.names, pa.string()).take(pa.array(labels.classes)).dictionary_encode()
        context.output.write_table(TRUE_LABELS_NAME, pa.table({"image_id": labels.image_ids, "label": names}))
        if len(labels.image_ids) < inputs["assign"].num_rows(ASSIGNMENTS).sum():
            metrics["num_labelled"] = len(labels.image_ids)
        classes_N = labels.classes_of(features.image_ids)
        rows_n = training_rows_of(inputs, labels.image_ids)
        metrics |= evaluate(
            labels,
            assigned["cluster"].to_numpy(),
            assigned["agreement"].to_numpy(),
            np.where(rows_n >= 0, inputs["method"].read_array(LABELS_NAME)[:, rows_n], -1),
            read_losses(inputs["method"]),
            context.progress,
        )
    found = method_clusterings(config, inputs["method"], labels_N)
    if found:
        context.output.write_array(METHODS_NAME, np.stack(list(found.values())))
        found = {"consensus": labels_N} | found
    rows = [{"name": name} | describe(own_N, classes_N) | score(own_N) for name, own_N in found.items()]
    record = {
        "estimate_views": estimate[1] if estimate else None,
        "methods": rows,
        "method_nmi": nmi_matrix(list(found.values())).tolist(),
    }
    context.output.write_json(METRICS_NAME, metrics | record)
    return metrics


def _scorer(
    matrix_ND: npt.NDArray[np.floating], config: Config
) -> Callable[[npt.NDArray[np.integer]], dict[str, float | None]]:
    """A function that scores labels (N,) without labels, from a sample of the images trained on. Both scores are
    measured in the first principal components, which takes seconds where the features themselves take minutes."""
    rows = sampled_rows(len(matrix_ND), MAX_IMAGES, config.seed)
    features_nD = np.asarray(matrix_ND[rows], dtype=np.float32)
    points = {"pca": project_pca(prepare(features_nD, center=True)[:], config.seed)}
    if config.evaluate.silhouette_umap:
        points["umap"] = project_umap(features_nD, config.seed)
    return lambda labels_N: label_free_scores(points["pca"], points, labels_N[rows], random_state=config.seed)


def evaluate(
    labels: TrueLabels,
    clusters_N: npt.NDArray[np.integer],
    agreement_N: npt.NDArray[np.floating],
    heads_HN: npt.NDArray[np.integer],
    losses_H: npt.NDArray[np.floating] | None,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """The metrics of :func:`run`, from the assigned clusters of the labelled images, -1 for noise; their agreement, NaN
    for images that took no part in the consensus; the labels of the heads, -1 where a head gave none, and their
    losses."""
    metrics: dict[str, Any] = {**evaluate_with_noise(labels.classes, clusters_N), "num_classes": len(labels.names)}
    accuracy_H = np.full(len(heads_HN), np.nan)  # NaN for a head without labels
    for head, head_N in enumerate(heads_HN):
        given = head_N >= 0
        if given.any():
            accuracy_H[head] = clustering_accuracy(labels.classes[given], head_N[given])
        progress.update(head + 1, len(heads_HN), "compared with the labels")
    if np.isfinite(accuracy_H).any():
        metrics["head_acc_mean"] = float(np.nanmean(accuracy_H))
        metrics["head_acc_best"] = float(np.nanmax(accuracy_H))
        if losses_H is not None:
            best = int(np.where(np.isfinite(accuracy_H), losses_H, np.inf).argmin())
            metrics["head_acc_lowest_loss"] = float(accuracy_H[best])
    voted = np.isfinite(agreement_N)
    if voted.sum() >= 2:
        has_cluster = clusters_N >= 0
        table = contingency_table(labels.classes[has_cluster], clusters_N[has_cluster])
        class_of_cluster = np.unique(labels.classes[has_cluster])[match_to_classes(table)]
        cluster_index_n = np.searchsorted(np.unique(clusters_N[has_cluster]), clusters_N[voted])
        is_right = class_of_cluster[cluster_index_n] == labels.classes[voted]
        falling = np.argsort(-agreement_N[voted], kind="stable")
        half = len(falling) // 2
        metrics["acc_high_agreement"] = float(is_right[falling[:half]].mean())
        metrics["acc_low_agreement"] = float(is_right[falling[half:]].mean())
    return metrics


def _labelled_assignments(config: Config, inputs: Mapping[str, Artifact]) -> tuple[TrueLabels, pa.Table]:
    """The true labels of the images that have one, or of a sample of them, and the assignments of the same images."""
    assign, listing, named = inputs["assign"], Listing(inputs["images"]), None
    if has_names(config.evaluate) and assign.num_rows(ASSIGNMENTS).sum() > MAX_SCORED:
        # Drawn from all images, the sample might hold none of the few that have a label.
        named = named_images(config.evaluate, listing, MAX_SCORED)
    table = _read_assignments(assign, config.seed, None if named is None else named.image_ids)
    image_ids = table["image_id"].to_numpy()
    if named is None:
        labels = load_labels(config.evaluate, listing.uris(image_ids).to_pylist(), image_ids, len(listing))
    else:
        labels = named.only(image_ids)
    return labels, table.take(pa.array(np.searchsorted(image_ids, labels.image_ids)))


def _read_assignments(assign: Artifact, seed: int, image_ids: npt.NDArray[np.int64] | None) -> pa.Table:
    """image_id, cluster, agreement by ascending id: of all images, or of those given; of some MAX_SCORED of them drawn
    by their ids if there are more."""
    num_images = int(assign.num_rows(ASSIGNMENTS).sum()) if image_ids is None else len(image_ids)
    share = MAX_SCORED / max(1, num_images)
    tables = []
    for name in assign.part_names(ASSIGNMENTS):
        table = assign.read_table(name).select(["image_id", "cluster", "agreement"])
        if image_ids is not None:
            table = table.filter(pc.is_in(table["image_id"], pa.array(image_ids)))
        if share < 1:
            hashes_n = id_hashes(table["image_id"].to_numpy(), seed + 1)  # another draw than that of the sample stage
            table = table.filter(pa.array(hashes_n < np.uint64(share * 2**64)))
        tables.append(table)
    return pa.concat_tables(tables)
