"""ICCE on arrays in one process, as a scikit-learn estimator.

It runs the same maths as the pipeline, without Ray: the same features, settings and seed give the same labels. The
distributed stages are tested against it.

    >>> from icce_ray import ICCE
    >>> labels = ICCE(n_clusters=10, random_state=0).fit_predict(features)  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.classifier.linear import LinearClassifier
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import ClusteringConfig, validate
from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.count.choice import Choice
from icce_ray.count.clustering import count_clusters
from icce_ray.errors import ConfigError, InputError
from icce_ray.estimator_base import FeatureClusterer
from icce_ray.methods import METHODS
from icce_ray.methods.heads.fit import fit as fit_heads
from icce_ray.neighbors.graph import build_graph
from icce_ray.sample.training_set import TrainingRows, choose_rows


@dataclass(repr=False, eq=False)
class ICCE(FeatureClusterer):
    """Image clustering with adaptive neighbours, many heads and a cluster ensemble (arXiv 2511.16213).

    Args:
        n_clusters: number of clusters (K), or ``auto`` to choose it from the data, see `cluster_count`.
        method: ``icce``; ``temi`` (arXiv 2303.17896): fixed neighbours, softmax targets, the best head; or ``scan``
            (arXiv 2005.12320): its loss on the same heads, the best head.
        preset: ``paper``: every constant as the ICCE paper has it. None: our defaults.
        n_heads: number of clustering heads (H).
        epochs: passes over the images. None: the default of the config.
        batch_size: pairs per step. None: the default of the config.
        similarity_threshold: cosine from which on two images are neighbours; None for exactly `min_neighbors`
            neighbours; ``auto``: chosen from the features, or by the method or preset.
        random_state: int, RandomState or None. An int gives the same labels as a run with that ``seed``.
        device: torch device for the neighbour search, the heads and the classifier.
        n_threads: CPU threads; None for torch's setting. They do not change the result.
        sample, neighbors, heads, consensus, classifier, cluster_count: more settings of these sections of the config.
            `cluster_count` sets how ``auto`` chooses, such as ``{"min_clusters": 5, "max_clusters": 40}``.
        verbose: show progress on standard error.

    Attributes:
        labels_: (N,) int32, the consensus, 0..K-1.
        label_matrix_: (H, N) int32, the clusters of each head that did not collapse; -1 for rows that were not trained
            on: above ``sample["max_images"]`` rows the heads see a sample, and the classifier labels the rest.
        agreement_: (N,) float32, share of the heads that agree with `labels_`; NaN for rows that were not trained on.
        vote_entropy_: (N,) float32, entropy of the heads' votes in nats.
        anmi_: float, average normalised mutual information of `labels_` with the heads.
        consensus_method_: str, the consensus function whose result was kept.
        similarity_threshold_: float or None, the threshold that was used.
        head_losses_: (H,) float64, losses of the last epoch.
        n_clusters_: int, K.
        cluster_count_: with ``auto``, how K was chosen: `low` and `high`, the range that is as good; `by_count()`, a
            table of all measurements; `sentence()`. Else None.
        hierarchy_: the merges of the clusters, step by step: ``hierarchy_.cut(n)[labels_]`` gives n groups.
        classifier_: LinearClassifier, which `predict` uses.
        n_features_in_: int, D.
    """

    n_clusters: int | Literal["auto"]
    _: KW_ONLY
    method: Literal["icce", "temi", "scan"] = "icce"
    preset: Literal["paper"] | None = None
    n_heads: int = 50
    epochs: int | None = None
    batch_size: int | None = None
    similarity_threshold: float | Literal["auto"] | None = "auto"
    random_state: int | np.random.RandomState | None = None
    device: str = "cpu"
    n_threads: int | None = None
    sample: Mapping[str, Any] | None = None
    neighbors: Mapping[str, Any] | None = None
    heads: Mapping[str, Any] | None = None
    consensus: Mapping[str, Any] | None = None
    classifier: Mapping[str, Any] | None = None
    cluster_count: Mapping[str, Any] | None = None
    verbose: bool = False

    def fit(self, X: npt.ArrayLike, y: object = None) -> ICCE:
        """Cluster the rows of `X`, (N, D) finite; float16 and float32 are used as they are, everything else becomes
        float32. Raises ConfigError: a parameter is out of its range; InputError: fewer rows than clusters."""
        config = self._config()
        features_ND = self._check_rows(X, None if config.is_auto else config.num_clusters)
        training = choose_rows(features_ND, config.sample, config.seed)
        trained_on_nD = features_ND if training is None else features_ND[training.image_ids_n]
        if not config.is_auto and len(trained_on_nD) < config.num_clusters:
            raise InputError(
                f"n_clusters={config.num_clusters}, but only {len(trained_on_nD)} rows are trained on; near-duplicates "
                "are left out, and rows above sample['max_images']"
            )
        choice: Choice | None = None
        if config.is_auto:
            choice = count_clusters(
                trained_on_nD,
                config.cluster_count,
                center=config.neighbors.center,
                seed=config.seed,
                progress=self._progress("cluster_count", "parts of the sample"),
            )
            config = config.with_num_clusters(choice.num_clusters)
        graph, audit = build_graph(
            trained_on_nD,
            config.neighbors,
            num_clusters=config.num_clusters,
            seed=config.seed,
            progress=self._progress("neighbors", "images"),
            device=self.device,
            num_threads=self.n_threads or torch.get_num_threads(),
        )
        trained = fit_heads(
            trained_on_nD,
            graph,
            config.heads,
            num_clusters=config.num_clusters,
            seed=config.seed,
            device=self.device,
            num_threads=self.n_threads,
            progress=self._progress("heads", "epochs"),
        )
        ensemble = cluster_ensemble(
            trained.labels_HN,
            config.num_clusters,
            methods=config.consensus.methods,
            random_state=config.seed,
            refine=config.consensus.refine,
            imbalance=config.consensus.imbalance,
            head_losses=trained.losses_H,
            neighbors=graph.nearest_Nk if config.consensus.recombine else None,
            features=trained_on_nD if config.consensus.relabel else None,
        )
        self.classifier_: LinearClassifier = fit_classifier(
            trained_on_nD,
            ensemble.labels,
            config.classifier,
            num_clusters=config.num_clusters,
            seed=config.seed,
            outlier_quantile=config.assign.outlier_quantile,
            progress=self._progress("classifier", "iterations"),
            device=self.device,
        )
        self.n_clusters_ = config.num_clusters
        self.cluster_count_ = choice
        self.hierarchy_ = ensemble.hierarchy
        self.labels_ = ensemble.labels
        self.label_matrix_ = trained.labels_HN
        self.agreement_ = ensemble.agreement
        self.vote_entropy_ = ensemble.vote_entropy
        self.anmi_ = ensemble.consensus_anmi
        self.consensus_method_ = ensemble.method
        self.similarity_threshold_ = audit.similarity_threshold
        self.head_losses_ = trained.losses_H
        if training is not None:
            self._extend(features_ND, training)
        return self

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """Cluster of each row of `X` (n, D) by the classifier that learnt the consensus, (n,) int32. For fitted rows it
        may differ from `labels_` if the heads disagree."""
        features = self._check_new(X)
        return self.classifier_.predict(features)

    def predict_proba(self, X: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Calibrated probability of each cluster, (n, K) float32, rows sum to 1."""
        features = self._check_new(X)
        return self.classifier_.predict_proba(features)

    def _extend(self, features_ND: npt.NDArray[Any], training: TrainingRows) -> None:
        """Extend the results to all rows: near-duplicates get those of their leader, and the classifier labels the
        rest."""
        rows_N = training.rows_of(np.arange(len(features_ND)))
        stands_N = rows_N >= 0
        self.labels_ = np.where(stands_N, self.labels_[rows_N], self.classifier_.predict(features_ND))
        self.label_matrix_ = np.where(stands_N, self.label_matrix_[:, rows_N], np.int32(-1))
        self.agreement_ = np.where(stands_N, self.agreement_[rows_N], np.float32(np.nan))
        self.vote_entropy_ = np.where(stands_N, self.vote_entropy_[rows_N], np.float32(np.nan))

    def _config(self) -> ClusteringConfig:
        given = {"num_heads": self.n_heads, "num_epochs": self.epochs, "batch_size": self.batch_size}
        heads = {name: value for name, value in given.items() if value is not None}
        threshold = self.similarity_threshold
        neighbors = {"similarity_threshold": threshold} if threshold != "auto" else {}
        settings = {
            "num_clusters": self.n_clusters,
            "method": self.method,
            "preset": self.preset,
            "seed": self._seed(),
            "sample": dict(self.sample or {}),
            "neighbors": neighbors | dict(self.neighbors or {}),
            "heads": heads | dict(self.heads or {}),
            "consensus": dict(self.consensus or {}),
            "classifier": dict(self.classifier or {}),
            "cluster_count": dict(self.cluster_count or {}),
        }
        config = validate(ClusteringConfig, settings, type(self).__name__)
        with_heads = [name for name, method in METHODS.items() if method.section == "heads"]
        if config.method not in with_heads:
            raise ConfigError(
                f"{type(self).__name__}: method is {self.method!r}, which trains no heads; give "
                f"{', '.join(with_heads)}, or run it by a config or by its own estimator"
            )
        if config.consensus.extra_runs:
            raise ConfigError(
                f"{type(self).__name__}: consensus.extra_runs names runs of the pipeline, which do not exist here; "
                "give cluster_ensemble a list of label matrices instead"
            )
        return config
