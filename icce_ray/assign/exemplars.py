"""Exemplars: a few images that stand for each cluster [ours] (docs/METHOD.md, "Exemplars").

The images are seen once, in any order and in any parts. Each gets a priority, a hash of its id and the seed, so the
lowest priorities of a cluster are a uniform sample of it, however the images are divided. While a part is labelled,
the images that may be in the samples are kept as candidates. At the end, the best half of each cluster's sample is
thinned out to images that are unlike each other. Outliers and noise are never exemplars.

Shapes: n images, D dimensions, K clusters, p projected dimensions.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.classifier.linear import NOISE, LinearClassifier, Prediction, center_and_scale
from icce_ray.random_numbers import id_hashes

SAMPLE_PER_EXEMPLAR = 16
"""Sampled images per exemplar wanted."""
KEPT_SHARE = 0.5
"""Share of the sample that exemplars are chosen from: the highest agreement, then the lowest outlier score."""
MARGIN = 4.0
"""Candidates kept, as a multiple of the sample, going by the cluster's share of the training images. The images at hand
may have other shares."""
NUM_PROJECTED_DIMS = 32
CANDIDATES_SCHEMA = pa.schema(
    [
        ("cluster", pa.int32()),
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("consensus_probability", pa.float32()),
        ("agreement", pa.float32()),
        ("outlier_score", pa.float32()),
        ("priority", pa.uint64()),
        ("projection", pa.list_(pa.float32(), NUM_PROJECTED_DIMS)),
    ]
)
EXEMPLARS_SCHEMA = pa.schema(
    [
        ("cluster", pa.int32()),
        ("rank", pa.int32()),
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("agreement", pa.float32()),
        ("consensus_probability", pa.float32()),
    ]
)
"""Sorted by cluster and rank; rank 0 is the most central image."""


def candidates_table(
    assignments: pa.Table,
    features_nD: npt.NDArray[np.floating],
    prediction: Prediction,
    classifier: LinearClassifier,
    *,
    num_images: int,
    num_exemplars: int,
    seed: int,
) -> pa.Table:
    """Images that may become exemplars, `num_exemplars` for each cluster, with what it takes to choose among them. All
    parts together have `num_images`."""
    priority_n = id_hashes(assignments["image_id"].to_numpy(), seed)
    limit_K = _priority_limits(classifier, num_images, num_exemplars)
    may_be = (prediction.cluster != NOISE) & ~prediction.is_outlier
    rows = np.flatnonzero(may_be & (priority_n <= limit_K[prediction.cluster]))
    x_nD = center_and_scale(features_nD[rows], classifier.mean, classifier.scale)
    projected = classifier.outliers.project(x_nD, NUM_PROJECTED_DIMS)
    projection_np = np.zeros((len(rows), NUM_PROJECTED_DIMS), dtype=np.float32)
    projection_np[:, : projected.shape[1]] = projected
    columns: dict[str, Any] = {
        "outlier_score": pa.array(prediction.outlier_score[rows]),
        "priority": pa.array(priority_n[rows]),
        "projection": pa.FixedSizeListArray.from_arrays(pa.array(projection_np.ravel()), NUM_PROJECTED_DIMS),
    }
    candidates = assignments.take(pa.array(rows))
    columns |= {name: candidates[name] for name in CANDIDATES_SCHEMA.names if name not in columns}
    return pa.table([columns[name] for name in CANDIDATES_SCHEMA.names], schema=CANDIDATES_SCHEMA)


def choose_exemplars(candidates: pa.Table, num_exemplars: int) -> pa.Table:
    """Choose at most `num_exemplars` images of each cluster among the candidates of all parts, in any order:
    EXEMPLARS_SCHEMA."""
    cluster_n, priority_n = candidates["cluster"].to_numpy(), candidates["priority"].to_numpy()
    order = np.lexsort((priority_n, cluster_n))
    starts = np.flatnonzero(np.diff(cluster_n[order], prepend=-1))
    chosen, ranks = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for rows in np.split(order, starts)[1:]:
        sample = candidates.take(pa.array(rows[: SAMPLE_PER_EXEMPLAR * num_exemplars]))
        agreement_n = sample["agreement"].to_numpy()  # null as NaN, which sorts last
        best = np.lexsort((sample["outlier_score"].to_numpy(), -agreement_n))
        best = best[: max(num_exemplars, round(KEPT_SHARE * len(sample)))]
        points = sample["projection"].take(pa.array(best)).combine_chunks().flatten().to_numpy()
        picked = best[farthest_first(points.reshape(len(best), -1), num_exemplars)]
        chosen.append(rows[picked])
        ranks.append(np.arange(len(picked)))
    exemplars = candidates.take(pa.array(np.concatenate(chosen)))
    exemplars = exemplars.append_column("rank", pa.array(np.concatenate(ranks)))
    return exemplars.select(EXEMPLARS_SCHEMA.names).cast(EXEMPLARS_SCHEMA)


def farthest_first(points_cD: npt.NDArray[np.float32], num_points: int) -> npt.NDArray[np.int64]:
    """Indices of at most `num_points` points: the one nearest to the mean, then always the one farthest from those
    picked (Gonzalez, Theor. Comput. Sci. 38, 1985). Ties go to the first; points equal to a picked one come last."""
    points = points_cD.astype(np.float64)
    nearest_c = np.full(len(points), np.inf)
    picked = [int(((points - points.mean(axis=0)) ** 2).sum(axis=1).argmin())]
    while len(picked) < min(num_points, len(points)):
        nearest_c = np.minimum(nearest_c, ((points - points[picked[-1]]) ** 2).sum(axis=1))
        nearest_c[picked] = -1.0
        picked.append(int(nearest_c.argmax()))
    return np.array(picked, dtype=np.int64)


def _priority_limits(classifier: LinearClassifier, num_images: int, num_exemplars: int) -> npt.NDArray[np.uint64]:
    """(K,) uint64: an image whose priority is above its cluster's limit need not be kept."""
    shares_K = classifier.cluster_sizes / max(int(classifier.cluster_sizes.sum()), 1)
    wanted = MARGIN * SAMPLE_PER_EXEMPLAR * num_exemplars
    kept_K = np.minimum(1.0, wanted / np.maximum(shares_K * num_images, 1e-9))
    largest = np.iinfo(np.uint64).max
    # 2^64 - 1 as a float is 2^64, which doesn't fit into 64 bits.
    return np.where(kept_K >= 1.0, largest, (np.minimum(kept_K, 1 - 1e-9) * 2.0**64).astype(np.uint64))
