"""Exemplars of images that pass by once, in any order, in any parts [ours].

Each image gets a priority from its id alone. The images of a cluster with the lowest priorities are a uniform sample of
it, whatever the parts. A worker keeps the few that may be among them, with what is needed to compare them: how far from
the middle of the cluster, and coordinates along the directions in which its images differ most. In the end the central
half of each sample is thinned out to images that are unlike each other.

Shapes: n images, K clusters, p projected dims.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.assign.exemplars import CANDIDATES_PER_EXEMPLAR, CENTRAL_SHARE, farthest_first
from icce_ray.classifier.linear import LinearClassifier, Prediction, center_and_scale

NUM_PROJECTED_DIMS = 32
MARGIN = 4.0
"""So many times the candidates expected by a cluster's size in training are kept: new images may differ."""
SCHEMA = pa.schema(
    [
        ("cluster", pa.int32()),
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("confidence", pa.float32()),
        ("priority", pa.uint64()),
        ("outlier_score", pa.float32()),
        ("projection", pa.list_(pa.float32())),
    ]
)
EXEMPLARS_SCHEMA = pa.schema(
    [
        ("cluster", pa.int32()),
        ("rank", pa.int32()),
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("confidence", pa.float32()),
    ]
)


def priorities(image_ids: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """(n,) uint64, uniform, of the ids and the seed alone: splitmix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        mixed = (image_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def cutoffs(classifier: LinearClassifier, num_images: int, num_exemplars: int) -> npt.NDArray[np.uint64]:
    """(K,) uint64: images of a cluster with a higher priority need not be kept, when `num_images` pass by in all."""
    shares_K = classifier.cluster_sizes / max(int(classifier.cluster_sizes.sum()), 1)
    wanted = MARGIN * CANDIDATES_PER_EXEMPLAR * num_exemplars
    kept_K = np.minimum(1.0, wanted / np.maximum(shares_K * num_images, 1e-9))
    largest = np.iinfo(np.uint64).max
    # As a float, 2^64 - 1 is 2^64, which no integer of 64 bits is.
    return np.where(kept_K >= 1.0, largest, (np.minimum(kept_K, 1 - 1e-9) * 2.0**64).astype(np.uint64))


def candidates_table(
    image_ids: npt.NDArray[np.int64],
    uris: pa.ChunkedArray,
    features_nD: npt.NDArray[np.floating],
    prediction: Prediction,
    classifier: LinearClassifier,
    cutoffs_K: npt.NDArray[np.uint64],
    seed: int,
) -> pa.Table:
    """The images that may become exemplars; outliers may not."""
    priority_n = priorities(image_ids, seed)
    rows = np.flatnonzero((priority_n <= cutoffs_K[prediction.cluster]) & ~prediction.is_outlier)
    x_nD = center_and_scale(features_nD[rows], classifier.mean, classifier.scale)
    projected_np = classifier.outliers.project(x_nD, NUM_PROJECTED_DIMS)
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * projected_np.shape[1]
    return pa.table(
        [
            pa.array(prediction.cluster[rows]),
            pa.array(image_ids[rows]),
            uris.take(pa.array(rows)),
            pa.array(prediction.confidence[rows]),
            pa.array(priority_n[rows]),
            pa.array(prediction.outlier_score[rows]),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(projected_np).ravel())),
        ],
        schema=SCHEMA,
    )


def choose_exemplars(candidates: pa.Table, num_exemplars: int) -> pa.Table:
    """At most `num_exemplars` of each cluster, by cluster and rank: the most central first, then always the one
    farthest from those before it.

    Args:
        candidates: all parts' tables joined, in any order.
    """
    cluster_n, priority_n = candidates["cluster"].to_numpy(), candidates["priority"].to_numpy()
    order = np.lexsort((priority_n, cluster_n))
    chosen: list[npt.NDArray[np.int64]] = []
    starts = np.flatnonzero(np.diff(cluster_n[order], prepend=-1))
    for rows in np.split(order, starts[1:]) if len(order) else []:
        sample = rows[: CANDIDATES_PER_EXEMPLAR * num_exemplars]
        score_n = candidates["outlier_score"].take(pa.array(sample)).to_numpy()
        num_kept = max(num_exemplars, round(CENTRAL_SHARE * len(sample)))
        kept = sample[np.argsort(score_n, kind="stable")][:num_kept]
        points = candidates["projection"].take(pa.array(kept)).combine_chunks().flatten().to_numpy()
        chosen.append(kept[farthest_first(points.reshape(len(kept), -1), num_exemplars)])
    rows = np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)
    ranks = [np.arange(len(one), dtype=np.int32) for one in chosen]
    found = candidates.select(["cluster", "image_id", "uri", "confidence"]).take(pa.array(rows))
    rank = pa.array(np.concatenate(ranks) if ranks else np.empty(0, dtype=np.int32))
    return found.add_column(1, "rank", rank).cast(EXEMPLARS_SCHEMA)
