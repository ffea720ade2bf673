"""With several methods: one clustering of each, in the cluster numbers of their consensus, and how far they agree.

Shapes: N images, M clusterings.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.config import Config
from icce_ray.consensus.other_runs import find_heads
from icce_ray.methods.clusterings import LABELS_NAME, read_losses
from icce_ray.metrics.contingency import as_array, count_table, match_clusters
from icce_ray.metrics.true_label_scores import evaluate_with_noise, normalized_mutual_info
from icce_ray.store import Artifact

Labels = npt.NDArray[np.int32]


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
        found[name] = renumber(np.array(run.read_array(LABELS_NAME)[row]), consensus_N)
    return found


def renumber(labels_N: Labels, like_N: Labels) -> Labels:
    """`labels_N` with the numbers of the clusters of `like_N` that they are found again in; clusters that are left over
    get the next numbers. -1 stays."""
    known_N, num_numbers = labels_N >= 0, int(like_N.max(initial=-1)) + 1
    values, codes_n = np.unique(labels_N[known_N], return_inverse=True)
    counts = count_table(codes_n, like_N[known_N], len(values), num_numbers)
    matched = match_clusters(as_array(counts))
    number_of = np.array([matched.get(code, -1) for code in range(len(values))], dtype=np.int32)
    left = number_of < 0
    number_of[left] = num_numbers + np.arange(left.sum())
    renumbered_N = np.full(len(labels_N), -1, dtype=np.int32)
    renumbered_N[known_N] = number_of[codes_n]
    return renumbered_N


def nmi_matrix(labels: Sequence[Labels]) -> npt.NDArray[np.float64]:
    """NMI (geometric) between each two of M labellings of the same images, (M, M); images that either of two calls
    noise (-1) are left out, and it is 0 where none is left."""
    matrix_MM = np.eye(len(labels))
    for one, first_N in enumerate(labels):
        for other, second_N in enumerate(labels[:one]):
            both = (first_N >= 0) & (second_N >= 0)
            value = normalized_mutual_info(first_N[both], second_N[both]) if both.any() else 0.0
            matrix_MM[one, other] = matrix_MM[other, one] = value
    return matrix_MM


def describe(labels_N: npt.NDArray[np.integer], classes_N: npt.NDArray[np.integer] | None) -> dict[str, Any]:
    """num_clusters and num_noise of a clustering, and acc, nmi and ari of the images whose class is known, not -1."""
    figures: dict[str, Any] = {"num_clusters": len(np.unique(labels_N[labels_N >= 0]))}
    figures["num_noise"] = int((labels_N < 0).sum())
    if classes_N is not None and (classes_N >= 0).any():
        scores = evaluate_with_noise(classes_N[classes_N >= 0], labels_N[classes_N >= 0])
        figures |= {name: scores[name] for name in ("acc", "nmi", "ari")}
    return figures
