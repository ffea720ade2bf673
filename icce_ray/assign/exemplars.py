"""A few images that stand for each cluster: central ones, and unlike each other [ours].

They are picked from the consensus alone, before the images are labelled in a stream, so no second pass is needed and
the state is a bounded number of candidates of one cluster at a time.

Shapes: N images, D dims, K clusters, c candidates.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from icce_ray.classifier.linear import LinearClassifier

CANDIDATES_PER_EXEMPLAR = 16
"""Images looked at per exemplar wanted: those with the highest agreement, drawn at random among equals."""
CENTRAL_SHARE = 0.5
"""Of the candidates, by the classifier's confidence: exemplars come from these."""


def pick_exemplars(
    features_ND: npt.NDArray[np.floating],
    consensus_N: npt.NDArray[np.integer],
    agreement_N: npt.NDArray[np.floating],
    classifier: LinearClassifier,
    *,
    num_exemplars: int,
    seed: int,
) -> list[npt.NDArray[np.int64]]:
    """Rows of the exemplars of each cluster, the most central first; fewer where the cluster is smaller.

    Per cluster: the images with the highest agreement; of them the half that the classifier is surest of, outliers left
    out; of these first the one nearest to their mean, then always the one farthest from all picked so far.

    Args:
        features_ND: may be memory-mapped; only the candidates' rows are read.
        consensus_N: -1 for images that took no part; those are never exemplars.
        seed: of the draw among equals.
    """
    draw_N = np.random.default_rng([seed, 6]).random(len(consensus_N))
    # By cluster, then falling agreement, then by lot.
    order = np.lexsort((draw_N, -agreement_N, consensus_N))
    bounds = np.searchsorted(consensus_N[order], np.arange(classifier.num_clusters + 1))
    picked = []
    for cluster in range(classifier.num_clusters):
        rows = order[bounds[cluster] : bounds[cluster + 1]][: CANDIDATES_PER_EXEMPLAR * num_exemplars]
        picked.append(_pick(features_ND, np.sort(rows), cluster, classifier, num_exemplars))
    return picked


def _pick(
    features_ND: npt.NDArray[np.floating],
    rows_c: npt.NDArray[np.int64],
    cluster: int,
    classifier: LinearClassifier,
    num_exemplars: int,
) -> npt.NDArray[np.int64]:
    if not len(rows_c):
        return rows_c
    features_cD = np.asarray(features_ND[rows_c], dtype=np.float32)
    labels = classifier.label(features_cD, np.full(len(rows_c), cluster))
    num_kept = max(num_exemplars, round(CENTRAL_SHARE * len(rows_c)))
    kept = np.flatnonzero(labels.cluster == cluster)
    # The confidence of clear images is the same to the last digit: then the middle of the cluster decides.
    gap_c = ((features_cD - features_cD.mean(axis=0)) ** 2).sum(axis=1)
    kept = kept[np.lexsort((gap_c[kept], -labels.confidence[kept], labels.is_outlier[kept]))][:num_kept]
    if not len(kept):
        return rows_c[:0]
    return rows_c[kept[farthest_first(features_cD[kept], num_exemplars)]]


def farthest_first(points_cD: npt.NDArray[np.float32], num_points: int) -> npt.NDArray[np.int64]:
    """At most `num_points` indices: of the point nearest to the mean, then always the one farthest from those picked.

    Ties go to the first. Points equal to a picked one come last. Source: Gonzalez, Theor. Comput. Sci. 38 (1985).
    """
    points = points_cD.astype(np.float64)
    nearest_c = np.full(len(points), np.inf)
    picked = [int(((points - points.mean(axis=0)) ** 2).sum(axis=1).argmin())]
    while len(picked) < min(num_points, len(points)):
        nearest_c = np.minimum(nearest_c, ((points - points[picked[-1]]) ** 2).sum(axis=1))
        nearest_c[picked] = -1.0
        picked.append(int(nearest_c.argmax()))
    return np.array(picked, dtype=np.int64)
