"""The methods of a combined run side by side: one clustering of each, in the cluster numbers of their consensus.

Shapes: N images trained on, M methods.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from icce_ray.config import Config
from icce_ray.consensus.extra_runs import find_heads
from icce_ray.methods.clusterings import LABELS_NAME, read_losses
from icce_ray.metrics.contingency import count_table, match_clusters
from icce_ray.metrics.true_label_scores import normalized_mutual_info
from icce_ray.store import Artifact

Labels = npt.NDArray[np.int32]


def method_clusterings(config: Config, own: Artifact, consensus_N: Labels) -> dict[str, Labels]:
    """For each run that takes part in the consensus, the clustering (N,) with the lowest loss, or the first where there
    are no losses. Empty for a run that stands alone.

    Args:
        config: of the run; its `consensus.extra_runs` are the others.
        own: the run's own clusterings.
        consensus_N: -1 for noise.
    """
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
    matched = match_clusters(counts if isinstance(counts, np.ndarray) else counts.toarray())
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
