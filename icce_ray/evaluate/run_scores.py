"""The evaluate stage: scores without labels, and how well the clusters match the true labels if there are any. Only the
report depends on it. With several methods, also one clustering of each, in the cluster numbers of their consensus.

The accuracy is also estimated without labels [ours] (docs/METHOD.md, "Estimated accuracy"). Agreement among clusterings
of one method says little about the truth, because they share its mistakes. So the clusters are compared with other
kinds of clustering. The estimate is the median of three views:

- neighbours: the share of the 20 nearest images that two k-means runs, on other halves of the images, put into the same
  cluster. It follows the share of neighbours with the same label.
- Ward, and average linkage: the share of images on which that clustering and the clusters agree, matched one to one.

Shapes: N images trained on, n images, D dimensions, M methods, R runs.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from sklearn.cluster import AgglomerativeClustering, KMeans

from icce_ray.config import Config
from icce_ray.consensus.other_runs import find_heads
from icce_ray.corrections.stage import consensus_of
from icce_ray.embed.feature_matrix import load_features
from icce_ray.evaluate.label_files import has_names
from icce_ray.evaluate.labels import TrueLabels, load_labels, named_images
from icce_ray.images.listing import Listing
from icce_ray.methods.clusterings import LABELS_NAME as MATRIX_NAME
from icce_ray.methods.clusterings import read_losses
from icce_ray.metrics import contingency
from icce_ray.metrics.label_free_scores import label_free_scores, project_pca, project_umap
from icce_ray.metrics.true_label_scores import (
    clustering_accuracy,
    contingency_table,
    evaluate_with_noise,
    match_clusters,
    normalized_mutual_info,
)
from icce_ray.neighbors.search import most_similar
from icce_ray.random_numbers import id_hashes, sampled_rows
from icce_ray.runtime.progress import QUIET, Progress
from icce_ray.sample.training_set import training_rows, training_set
from icce_ray.sample.unit_features import prepare
from icce_ray.stage import StageContext
from icce_ray.store import Artifact

MAX_IMAGES = 3_000
MIN_IMAGES_PER_CLUSTER = 5
NUM_NEAREST = 20
NUM_RUNS = 8

Ints = npt.NDArray[np.integer]

METRICS_NAME = "metrics.json"
ASSIGNMENTS = "assignments/"
MAX_SCORED = 2_000_000
"""If there are more images, a sample of about this size is compared with the true labels; with more names in a label
file, at least half as many."""
SAMPLED_IMAGES = 2 * MAX_IMAGES
"""Images that are read for the estimate, since some of them may be noise."""
LABELS_NAME = "labels.parquet"
"""image_id, label: the true label of each image, if labels were given; the report shows it."""
METHODS_NAME = "method_clusterings.npy"
"""With several methods: one clustering of each, (M, N) int32; the report shows them."""
Labels = npt.NDArray[np.int32]


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
        assign, listing, named = inputs["assign"], Listing(inputs["images"]), None
        if has_names(config.evaluate) and assign.num_rows(ASSIGNMENTS).sum() > MAX_SCORED:
            # Drawn from all images, the sample might hold none of the few that have a label.
            named = named_images(config.evaluate, listing, MAX_SCORED)
        ids = None if named is None else named.image_ids
        table = _read_assignments(assign, ["image_id", "cluster", "agreement"], config.seed, ids)
        image_ids = table["image_id"].to_numpy()
        if named is None:
            labels = load_labels(config.evaluate, listing.uris(image_ids).to_pylist(), image_ids, len(listing))
        else:
            labels = named.only(image_ids)
        names = pa.array(labels.names, pa.string()).take(pa.array(labels.classes)).dictionary_encode()
        context.output.write_table(LABELS_NAME, pa.table({"image_id": labels.image_ids, "label": names}))
        if len(labels.image_ids) < assign.num_rows(ASSIGNMENTS).sum():
            metrics["num_labelled"] = len(labels.image_ids)
        table = table.take(pa.array(np.searchsorted(image_ids, labels.image_ids)))
        classes_N = labels.classes_of(features.image_ids)
        heads, training = inputs["method"], training_rows(inputs)
        rows_n = (
            np.searchsorted(features.image_ids, labels.image_ids)
            if training is None
            else training.rows_of(labels.image_ids)
        )
        metrics |= evaluate(
            labels,
            table["cluster"].to_numpy(),
            table["agreement"].to_numpy(),
            np.where(rows_n >= 0, heads.read_array(MATRIX_NAME)[:, rows_n], -1),
            read_losses(heads),
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


def describe(labels_N: npt.NDArray[np.integer], classes_N: npt.NDArray[np.integer] | None) -> dict[str, Any]:
    """num_clusters and num_noise of a clustering, and acc, nmi and ari of the images whose class is known, not -1."""
    figures: dict[str, Any] = {"num_clusters": len(np.unique(labels_N[labels_N >= 0]))}
    figures["num_noise"] = int((labels_N < 0).sum())
    if classes_N is not None and (classes_N >= 0).any():
        scores = evaluate_with_noise(classes_N[classes_N >= 0], labels_N[classes_N >= 0])
        figures |= {name: scores[name] for name in ("acc", "nmi", "ari")}
    return figures


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
        class_of_cluster = np.unique(labels.classes[has_cluster])[match_clusters(table)]
        cluster_index_n = np.searchsorted(np.unique(clusters_N[has_cluster]), clusters_N[voted])
        is_right = class_of_cluster[cluster_index_n] == labels.classes[voted]
        falling = np.argsort(-agreement_N[voted], kind="stable")
        half = len(falling) // 2
        metrics["acc_high_agreement"] = float(is_right[falling[:half]].mean())
        metrics["acc_low_agreement"] = float(is_right[falling[half:]].mean())
    return metrics


def _read_assignments(
    assign: Artifact, columns: list[str], seed: int, image_ids: npt.NDArray[np.int64] | None = None
) -> pa.Table:
    """Columns of the assignments by ascending image_id: of all images, or of those given; of some MAX_SCORED of them
    drawn by their ids if there are more."""
    num_images = int(assign.num_rows(ASSIGNMENTS).sum()) if image_ids is None else len(image_ids)
    share = MAX_SCORED / max(1, num_images)
    tables = []
    for name in assign.part_names(ASSIGNMENTS):
        table = assign.read_table(name).select(columns)
        if image_ids is not None:
            table = table.filter(pc.is_in(table["image_id"], pa.array(image_ids)))
        if share < 1:
            hashes_n = id_hashes(table["image_id"].to_numpy(), seed + 1)  # another draw than that of the sample stage
            table = table.filter(pa.array(hashes_n < np.uint64(share * 2**64)))
        tables.append(table)
    return pa.concat_tables(tables)


def method_clusterings(config: Config, own: Artifact, consensus_N: Labels) -> dict[str, Labels]:
    """For each run that takes part in the consensus (N,), -1 for noise, the clustering (N,) with the lowest loss, or
    the first where there are no losses. `own` are the run's own clusterings. Empty for a run that stands alone."""
    if not config.consensus.extra_runs:
        return {}
    found: dict[str, Labels] = {}
    repeated: Counter[str] = Counter()
    for run in [own, *find_heads(config.consensus.extra_runs, config.output, own)]:
        losses_H = read_losses(run)
        row = 0 if losses_H is None else int(np.argmin(losses_H))
        method = str(run.manifest.config["method"])
        repeated[method] += 1
        name = method if repeated[method] == 1 else f"{method} ({repeated[method]})"
        found[name] = renumber(np.array(run.read_array(MATRIX_NAME)[row]), consensus_N)
    return found


def renumber(labels_N: Labels, like_N: Labels) -> Labels:
    """`labels_N` with the numbers of the clusters of `like_N` that they are found again in; clusters that are left over
    get the next numbers. -1 stays."""
    known_N, num_numbers = labels_N >= 0, int(like_N.max(initial=-1)) + 1
    values, codes_n = np.unique(labels_N[known_N], return_inverse=True)
    counts = contingency.count_table(codes_n, like_N[known_N], len(values), num_numbers)
    matched = contingency.match_clusters(contingency.as_array(counts))
    number_of = np.array([matched.get(code, -1) for code in range(len(values))], dtype=np.int32)
    left = number_of < 0
    number_of[left] = num_numbers + np.arange(left.sum())
    renumbered_N = np.full(len(labels_N), -1, dtype=np.int32)
    renumbered_N[known_N] = number_of[codes_n]
    return renumbered_N


def nmi_matrix(labels: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.float64]:
    """NMI (geometric) between each two of M labellings of the same images, (M, M); images that either of two calls
    noise (-1) are left out, and it is 0 where none is left."""
    matrix_MM = np.eye(len(labels))
    for one, first_N in enumerate(labels):
        for other, second_N in enumerate(labels[:one]):
            both = (first_N >= 0) & (second_N >= 0)
            value = normalized_mutual_info(first_N[both], second_N[both]) if both.any() else 0.0
            matrix_MM[one, other] = matrix_MM[other, one] = value
    return matrix_MM


def estimate_accuracy(
    features_nD: npt.NDArray[np.floating], clusters_n: Ints, *, seed: int
) -> tuple[float, dict[str, float]] | None:
    """The estimate, 0 to 1, and the three views, from a sample of at most MAX_IMAGES images that have a cluster (-1 is
    noise). Returns None for fewer than two clusters, or fewer than MIN_IMAGES_PER_CLUSTER images per cluster."""
    rows = np.flatnonzero(clusters_n >= 0)
    rows = rows[sampled_rows(len(rows), MAX_IMAGES, seed)]
    clusters = clusters_n[rows]
    num_clusters = len(np.unique(clusters))
    if num_clusters < 2 or len(rows) < max(NUM_NEAREST + 1, MIN_IMAGES_PER_CLUSTER * num_clusters):
        return None
    unit = prepare(np.asarray(features_nD[rows], dtype=np.float32), center=True)
    points = project_pca(unit[:], seed)
    _, nearest = most_similar(unit, np.arange(len(rows)), NUM_NEAREST)
    halves = half_sample_kmeans(unit[:], num_clusters, seed)
    views = {
        "neighbours": pair_precision(halves, nearest),
        "ward": _matched(clusters, points, num_clusters, linkage="ward"),
        "average_linkage": _matched(clusters, points, num_clusters, linkage="average", metric="cosine"),
    }
    return float(np.median(list(views.values()))), views


def pair_precision(labels_Rn: Ints, nearest_nM: Ints) -> float:
    """The chance that two of the R runs both put an image and one of its nearest into the same cluster."""
    num_runs = len(labels_Rn)
    together_nM = sum((labels_n[nearest_nM] == labels_n[:, None]).astype(np.int64) for labels_n in labels_Rn)
    return float((together_nM * (together_nM - 1) / (num_runs * (num_runs - 1))).mean())


def half_sample_kmeans(unit_nD: npt.NDArray[np.float32], num_clusters: int, seed: int) -> Ints:
    """Clusters of all images by NUM_RUNS k-means runs (R, n), each learnt from another half of the images."""
    rng = np.random.default_rng(seed)
    runs = []
    for run in range(NUM_RUNS):
        half = rng.permutation(len(unit_nD))[: max(num_clusters, len(unit_nD) // 2)]
        kmeans = KMeans(num_clusters, n_init=2, random_state=seed + run).fit(unit_nD[half])
        runs.append(kmeans.predict(unit_nD))
    return np.stack(runs)


def _matched(clusters: Ints, points: npt.NDArray[np.float32], num_clusters: int, **how: Any) -> float:
    return float(clustering_accuracy(clusters, AgglomerativeClustering(num_clusters, **how).fit_predict(points)))
