"""TURTLE on arrays in one process, as a scikit-learn estimator: the maths of ``method: turtle``, without Ray.

>>> from icce_ray import TURTLE
>>> labels = TURTLE(n_clusters=10, random_state=0).fit_predict([dino_features, clip_features])  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.utils.validation import check_array

from icce_ray.config import TurtleConfig, validate
from icce_ray.errors import InputError
from icce_ray.estimator_base import FLOATS, FeatureClusterer
from icce_ray.methods.turtle.feature_scaling import label_rows
from icce_ray.methods.turtle.run_block import run_blocks
from icce_ray.methods.turtle.train_runs import clusterings_of, layers_of, train_runs
from icce_ray.runtime.machine import usable_cpus
from icce_ray.runtime.threads import ThreadPool

Features = npt.ArrayLike | Sequence[npt.NDArray[Any]]
"""One matrix (N, D), or a list of arrays: feature sets of the same rows, with any D."""


@dataclass(repr=False, eq=False)
class TURTLE(FeatureClusterer):
    """Labels that linear classifiers learn quickly, on one or more feature sets (arXiv 2406.07236).

    Args:
        n_clusters: number of clusters (K).
        n_runs: runs from different seeds; the one with the highest generalisation score counts.
        n_steps: updates of the labels.
        random_state: int, RandomState or None. An int gives the same labels as a run with that ``seed``.
        device: torch device.
        n_threads: CPU threads; None: all. They do not change the result.
        turtle: more settings of this section of the config, such as ``{"scale_features": False}``.
        verbose: show progress on standard error.

    Attributes:
        labels_: (N,) int32, the clusters of the best run, 0..K-1.
        label_matrix_: (R, N) int32, the clusters of every run: a label matrix for `cluster_ensemble`.
        generalization_scores_: (R,) float64, 0 to 1.
        best_run_: int, the run with the highest score.
        layers_: the task encoder of the best run: (D + 1, K) for each feature set, the biases last.
        n_features_in_: int, D of the first feature set.
    """

    n_clusters: int
    _: KW_ONLY
    n_runs: int = 5
    n_steps: int = 1000
    random_state: int | np.random.RandomState | None = None
    device: str = "cpu"
    n_threads: int | None = None
    turtle: Mapping[str, Any] | None = None
    verbose: bool = False

    def fit(self, X: Features, y: object = None) -> TURTLE:
        """Cluster the rows of `X`, (N, D) finite, or a list of such arrays; float16 and float32 are used as they are,
        everything else becomes float32. Raises ConfigError: a parameter is out of its range; InputError: fewer rows
        than clusters, or feature sets with different numbers of rows."""
        given = {"num_runs": self.n_runs, "num_steps": self.n_steps}
        settings = validate(TurtleConfig, given | dict(self.turtle or {}), type(self).__name__)
        first, *others = _feature_sets(X)
        sets = [self._check_rows(first, self.n_clusters), *(check_array(other, dtype=FLOATS) for other in others)]
        _check_lengths(sets)
        num_threads = self.n_threads or usable_cpus()
        blocks = train_runs(
            sets,
            settings,
            run_blocks(settings.num_runs, self.n_clusters),
            num_clusters=self.n_clusters,
            seed=self._seed(),
            device=self.device,
            num_threads=num_threads,
            progress=self._progress("turtle", "steps"),
        )
        clusterings = clusterings_of(blocks)
        self.label_matrix_ = clusterings.labels_HN
        self.generalization_scores_ = np.array(clusterings.notes["generalization_scores"])
        self.best_run_ = int(self.generalization_scores_.argmax())
        self.labels_ = self.label_matrix_[self.best_run_]
        columns = slice(self.best_run_ * self.n_clusters, (self.best_run_ + 1) * self.n_clusters)
        self.layers_ = [layer_EC[:, columns].numpy() for layer_EC in layers_of(blocks)]
        return self

    def predict(self, X: Features) -> npt.NDArray[np.int32]:
        """Cluster of each row of `X`, as many feature sets as were fitted, by the task encoder of the best run, (n,)
        int32."""
        first, *others = _feature_sets(X)
        sets = [self._check_new(first), *(check_array(other, dtype=FLOATS) for other in others)]
        dims, fitted = [features.shape[1] for features in sets], [len(layer_EK) - 1 for layer_EK in self.layers_]
        if dims != fitted:
            raise InputError(f"X has feature sets with {dims} dimensions; it was fitted with {fitted}")
        _check_lengths(sets)
        layers = [torch.from_numpy(layer_EK) for layer_EK in self.layers_]
        with ThreadPool(self.n_threads or usable_cpus()) as pool:
            labels_1n = label_rows(sets, layers, self.n_clusters, device=torch.device("cpu"), pool=pool)
        labels_n: npt.NDArray[np.int32] = labels_1n[0]
        return labels_n


def _feature_sets(X: Any) -> list[Any]:
    """A list or tuple of arrays with two axes is several feature sets; everything else is one."""
    is_several = isinstance(X, (list, tuple)) and len(X) > 0 and all(getattr(one, "ndim", 0) == 2 for one in X)
    return list(X) if is_several else [X]


def _check_lengths(sets: Sequence[npt.NDArray[Any]]) -> None:
    lengths = [len(features) for features in sets]
    if len(set(lengths)) > 1:
        raise InputError(f"X has feature sets with {lengths} rows; all must have the same rows in the same order")
