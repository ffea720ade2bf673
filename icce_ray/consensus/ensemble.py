"""`cluster_ensemble`: one clustering from many, the public interface of the consensus (docs/METHOD.md, "Consensus").

>>> from icce_ray import cluster_ensemble
>>> result = cluster_ensemble([[0, 0, 1, 1], [1, 1, 0, 0]], n_clusters=2, random_state=0)
>>> result.labels
array([0, 0, 1, 1], dtype=int32)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils import check_random_state

from icce_ray.config import ConsensusConfig, validate
from icce_ray.consensus.best_consensus import EnsembleResult, find_consensus
from icce_ray.consensus.consensus_memory import check_memory
from icce_ray.consensus.label_matrix import Heads, check_matrix, encode_heads
from icce_ray.errors import InputError
from icce_ray.sample.unit_features import UnitFeatures, prepare


def cluster_ensemble(
    labels: npt.ArrayLike | Sequence[npt.NDArray[Any]],
    n_clusters: int | None = None,
    *,
    methods: Sequence[str] | None = None,
    random_state: int | np.random.RandomState | None = None,
    refine: bool = True,
    imbalance: float = 1.5,
    head_losses: npt.ArrayLike | None = None,
    neighbors: npt.ArrayLike | None = None,
    features: npt.ArrayLike | None = None,
) -> EnsembleResult:
    """Make one clustering of several: the consensus with the highest average NMI with them (Strehl & Ghosh 2002).

    Args:
        labels: (H, N) integers: H clusterings ("heads") of the same N images, labels from 0, -1 where a label is
            missing. An image without any label is noise, and stays without one. Or a list of such matrices, of several
            runs or methods over the same images, each with any number of heads and clusters. Every matrix has the same
            weight: the rows of one with fewer than another are taken several times.
        n_clusters: number of clusters of the consensus (K). None: that of the head with the most.
        methods: consensus functions to try: `mcla`, `hbgf`, `cspa`, `vote` (heads aligned one to one, majority),
            `best_head` (the head with the lowest loss, or else with the highest ANMI). None: the first four. Functions
            that would cost too much at this size are left out, with the reason in `skipped`.
        random_state: int, RandomState or None. The same int gives the same result.
        refine: whether images are reassigned as long as that raises the ANMI.
        imbalance: weight of METIS's heaviest part allowed, relative to the average.
        head_losses: (H,) losses of the heads of a single matrix, for `best_head` and the choice on the graph.
        neighbors: (N, k) integers, the images most similar to each image, -1 where there are fewer; 10 are a good
            number. With them, the clusterings and the consensus are recombined, the graph is cut, and it takes part in
            the choice.
        features: (N, D) finite, the features of the images. With them, if most images have no majority of the heads,
            these get the cluster that their features fit best.

    Returns:
        The labels, 0..K-1, and what is known about them. Each of the K clusters has an image, unless fewer than K
        images differ in their labels, or the result is a head that uses fewer.

    Raises:
        InputError: `labels` is not a matrix of integers, or several with the same images; it has a label below -1, or a
            head without any label; `n_clusters`, `head_losses`, `neighbors` or `features` do not fit it.
        ConfigError: `methods` or `imbalance` is out of its range.
        ResourceError: this machine lacks the memory; the message says what is needed.
    """
    heads = encode_heads(_stack(labels))
    num_clusters = _check_num_clusters(n_clusters, heads)
    given: dict[str, Any] = {"refine": refine, "imbalance": imbalance}
    if methods is not None:
        given["methods"] = (methods,) if isinstance(methods, str) else tuple(dict.fromkeys(methods))
    config = validate(ConsensusConfig, given, "cluster_ensemble")
    losses = _check_losses(head_losses, heads)
    nearest = _check_neighbors(neighbors, heads)
    unit = None if features is None else _check_features(features, heads)
    check_memory(heads, num_clusters, config.methods, has_graph=nearest is not None)
    is_seed = isinstance(random_state, (int, np.integer))
    seed: Any = random_state if is_seed else check_random_state(random_state).randint(2**31 - 1)
    return find_consensus(
        heads,
        num_clusters,
        config,
        seed=int(seed),
        head_losses=losses,
        nearest=nearest,
        unit_features=None if unit is None else lambda: unit,
    )


def _stack(labels: npt.ArrayLike | Sequence[npt.NDArray[Any]]) -> npt.ArrayLike:
    """Several label matrices as one. Anything else is returned as it is, to be checked as a single matrix."""
    if not isinstance(labels, (list, tuple)) or not labels or any(np.ndim(one) != 2 for one in labels):
        return labels  # type: ignore[return-value]
    matrices = [np.asarray(one) for one in labels]
    for one in matrices:
        check_matrix(one.shape, one.dtype)
    if len({one.shape[1] for one in matrices}) > 1:
        shapes = ", ".join(str(one.shape) for one in matrices)
        raise InputError(f"the label matrices have the shapes {shapes}; all must have the same images (columns)")
    most = max(len(one) for one in matrices)
    return np.concatenate([np.resize(one, (most, one.shape[1])) for one in matrices])


def _check_num_clusters(n_clusters: int | None, heads: Heads) -> int:
    if n_clusters is None:
        n_clusters = int(heads.num_clusters.max())
        if n_clusters < 2:
            raise InputError(
                "every head has a single cluster: there is nothing to combine; give n_clusters, or other heads"
            )
    if not isinstance(n_clusters, (int, np.integer)) or not 1 <= n_clusters <= heads.num_images:
        raise InputError(
            f"n_clusters is {n_clusters}; it must be a whole number from 1 to the number of labelled images, "
            f"{heads.num_images}"
        )
    return int(n_clusters)


def _check_losses(head_losses: npt.ArrayLike | None, heads: Heads) -> npt.NDArray[np.float64] | None:
    if head_losses is None:
        return None
    losses = np.asarray(head_losses, dtype=np.float64)
    if losses.shape != (heads.num_heads,):
        raise InputError(
            f"head_losses has shape {losses.shape}; it must hold one loss for each of {heads.num_heads} heads"
        )
    return losses


def _check_features(features: npt.ArrayLike, heads: Heads) -> UnitFeatures:
    values = np.asarray(features)
    num_images = heads.num_images + len(heads.unlabelled)
    if values.ndim != 2 or len(values) != num_images or values.dtype.kind not in "fiu":
        raise InputError(
            f"features is {values.dtype} of shape {values.shape}; it must be numbers of shape ({num_images}, D)"
        )
    return prepare(values, center=True)


def _check_neighbors(neighbors: npt.ArrayLike | None, heads: Heads) -> npt.NDArray[np.integer[Any]] | None:
    if neighbors is None:
        return None
    nearest, num_images = np.asarray(neighbors), heads.num_images + len(heads.unlabelled)
    if nearest.ndim != 2 or len(nearest) != num_images or not np.issubdtype(nearest.dtype, np.integer):
        raise InputError(
            f"neighbors is {nearest.dtype} of shape {nearest.shape}; it must be integers of shape ({num_images}, k)"
        )
    if nearest.size and not -1 <= nearest.min() <= nearest.max() < num_images:
        raise InputError(
            f"neighbors holds numbers from {nearest.min()} to {nearest.max()}; they are images, 0 to {num_images - 1}, "
            "or -1 where there are fewer"
        )
    return nearest
