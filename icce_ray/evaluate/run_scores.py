"""The evaluate stage: how well the clusters match the true labels, if there are any. Nothing else depends on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.config import Config
from icce_ray.corrections.stage import consensus_of
from icce_ray.embed.feature_matrix import load_features
from icce_ray.evaluate.estimated_accuracy import MAX_IMAGES, estimate_accuracy
from icce_ray.evaluate.labels import TrueLabels, load_labels
from icce_ray.images.listing import Listing
from icce_ray.methods.clusterings import read_losses
from icce_ray.metrics.true_label_scores import (
    clustering_accuracy,
    contingency_table,
    evaluate_with_noise,
    match_clusters,
)
from icce_ray.runtime.progress import Progress
from icce_ray.sample.training_set import training_rows, training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact

METRICS_NAME = "metrics.json"
SAMPLED_IMAGES = 2 * MAX_IMAGES
"""Images that are read for the estimate, since some of them may be noise."""
LABELS_NAME = "labels.parquet"
"""image_id, label: the true label of each image, if labels were given; the report shows it."""


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Compare the assignments with the true labels.

    Returns:
        estimated_accuracy (made without labels; left out where it cannot be made). With labels also acc, nmi
        (geometric), nmi_arithmetic, ari, many_to_one over all embedded images, and if some of them are noise num_noise
        and acc_without_noise; head_acc_mean, head_acc_best (by the true labels), head_acc_lowest_loss over the images
        of the consensus; acc_high_agreement and acc_low_agreement, over the halves of these by agreement; num_classes.

    Raises:
        InputError: labels that cannot be used.
    """
    metrics: dict[str, Any] = {}
    estimate = _estimate(config, context)
    if config.evaluate.labels is not None:
        table = _read_assignments(context.inputs["assign"], ["image_id", "cluster", "agreement"])
        image_ids = table["image_id"].to_numpy()
        listing = Listing(context.inputs["images"])
        labels = load_labels(config.evaluate, listing.table(0, len(listing))["uri"].to_pylist(), image_ids)
        names = pa.array(labels.names, pa.string()).take(pa.array(labels.classes)).dictionary_encode()
        context.output.write_table(LABELS_NAME, pa.table({"image_id": image_ids, "label": names}))
        heads = context.inputs["method"]
        heads_HN = heads.read_array("label_matrix.npy")
        training = training_rows(context.inputs)
        if training is not None:
            rows_N = training.rows_of(image_ids)
            heads_HN = np.where(rows_N >= 0, heads_HN[:, rows_N], -1)
        metrics = evaluate(
            labels,
            table["cluster"].to_numpy(),
            table["agreement"].to_numpy(),
            heads_HN,
            read_losses(heads),
            context.progress,
        )
    if estimate is not None:
        metrics |= {"estimated_accuracy": estimate[0]}
    context.output.write_json(METRICS_NAME, metrics | {"estimate_views": estimate[1] if estimate else None})
    return metrics


def _estimate(config: Config, context: StageContext) -> tuple[float, dict[str, float]] | None:
    """The estimated accuracy of the clusters, from a sample of the images trained on."""
    labels_N = consensus_of(context.inputs).read_array("labels.npy")
    rows = np.arange(len(labels_N))
    if len(rows) > SAMPLED_IMAGES:
        rows = np.sort(np.random.default_rng(config.seed).choice(len(rows), SAMPLED_IMAGES, replace=False))
    features_nD = load_features(training_set(context.inputs)).matrix[rows]
    return estimate_accuracy(features_nD, np.asarray(labels_N[rows]), seed=config.seed)


def evaluate(
    labels: TrueLabels,
    clusters_N: npt.NDArray[np.integer],
    agreement_N: npt.NDArray[np.floating],
    heads_HN: npt.NDArray[np.integer],
    losses_H: npt.NDArray[np.floating] | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The metrics of :func:`run`.

    Args:
        clusters_N: assigned clusters of the labelled images, -1 for noise.
        agreement_N: NaN for images that took no part in the consensus.
        heads_HN: labels of the heads, -1 where a head gave none.
        losses_H: losses of the heads, None if there are none.
    """
    metrics: dict[str, Any] = {**evaluate_with_noise(labels.classes, clusters_N), "num_classes": len(labels.names)}
    accuracy_H = np.full(len(heads_HN), np.nan)  # NaN for a head without labels
    for head, head_N in enumerate(heads_HN):
        given = head_N >= 0
        if given.any():
            accuracy_H[head] = clustering_accuracy(labels.classes[given], head_N[given])
        if progress is not None:
            progress.update(head + 1, len(heads_HN), "heads compared")
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
        class_of_cluster = np.unique(labels.classes[has_cluster])[match_clusters(table)]
        cluster_index_n = np.searchsorted(np.unique(clusters_N[has_cluster]), clusters_N[voted])
        is_right = class_of_cluster[cluster_index_n] == labels.classes[voted]
        falling = np.argsort(-agreement_N[voted], kind="stable")
        half = len(falling) // 2
        metrics["acc_high_agreement"] = float(is_right[falling[:half]].mean())
        metrics["acc_low_agreement"] = float(is_right[falling[half:]].mean())
    return metrics


def _read_assignments(assign: Artifact, columns: list[str]) -> pa.Table:
    """Columns of all assignments, by ascending image_id."""
    return pa.concat_tables([assign.read_table(name).select(columns) for name in assign.part_names("assignments/")])
