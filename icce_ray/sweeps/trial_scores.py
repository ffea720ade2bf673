"""How good the clusters of a trial are, judged without labels (docs/METHOD.md, "Scores without labels")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.config import Config
from icce_ray.embed.feature_matrix import load_features
from icce_ray.metrics.label_free_scores import generalization_score, silhouette
from icce_ray.sample.training_set import training_set
from icce_ray.stage import StageContext
from icce_ray.sweeps.silhouette_spaces import SEED, sample, spaces


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Score the consensus; nothing but the metrics is kept.

    Returns:
        anmi, generalization, silhouette_pca, and silhouette_umap if UMAP is installed; None where a score is not
        defined, such as for a single cluster; num_clusters_used.
    """
    consensus = context.inputs["consensus"]
    labels_N = consensus.read_array("labels.npy")
    matrix_ND = load_features(training_set(context.inputs)).matrix
    rows = sample(len(matrix_ND))
    points = {space: context.inputs["silhouette_spaces"].read_array(f"{space}.npy") for space in spaces()}
    metrics = score(np.array(matrix_ND[rows], dtype=np.float32), points, labels_N[rows])
    return {"anmi": consensus.metrics["anmi"], **metrics, "num_clusters_used": len(np.unique(labels_N[labels_N >= 0]))}


def score(
    features_nD: npt.NDArray[np.float32],
    points: Mapping[str, npt.NDArray[np.float32]],
    labels_n: npt.NDArray[np.integer[Any]],
) -> dict[str, float | None]:
    """`generalization`, and `silhouette_<space>` for each space of `points`, of the same n images."""
    silhouettes = {f"silhouette_{space}": silhouette(points_nd, labels_n) for space, points_nd in points.items()}
    return {"generalization": generalization_score(features_nD, labels_n, random_state=SEED)} | silhouettes
