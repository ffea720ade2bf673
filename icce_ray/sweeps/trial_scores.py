"""How good the clusters of a trial are, judged without labels (METHOD section 5)."""

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
from icce_ray.store import Artifact
from icce_ray.sweeps.silhouette_spaces import SEED, sample, spaces

SILHOUETTE = "silhouette_"


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Judge the consensus; nothing but the metrics is kept.

    Returns:
        anmi, generalization, silhouette_pca, silhouette_umap where UMAP can be had: None where one cannot be told,
        such as for a single cluster; num_clusters_used.
    """
    consensus = context.inputs["consensus"]
    labels_N = consensus.read_array("labels.npy")
    metrics = measure(training_set(context.inputs), context.inputs["projection"], labels_N)
    return {"anmi": consensus.metrics["anmi"], **metrics, "num_clusters_used": len(np.unique(labels_N))}


def measure(embed: Artifact, projection: Artifact, labels_N: npt.NDArray[np.integer[Any]]) -> dict[str, float | None]:
    """The metrics that look at features, of a sample of the images.

    Args:
        embed: the features that were trained on.
        projection: their spaces.
        labels_N: a cluster of each image.
    """
    matrix_ND = load_features(embed).matrix
    rows = sample(len(matrix_ND))
    labels_n = np.asarray(labels_N)[rows]
    points = {space: projection.read_array(f"{space}.npy") for space in spaces()}
    return measure_arrays(np.array(matrix_ND[rows], dtype=np.float32), points, labels_n)


def measure_arrays(
    features_nD: npt.NDArray[np.float32],
    points: Mapping[str, npt.NDArray[np.float32]],
    labels_n: npt.NDArray[np.integer[Any]],
) -> dict[str, float | None]:
    """`generalization`, and a silhouette in each space of `points`, of images that were sampled already."""
    silhouettes = {f"{SILHOUETTE}{space}": silhouette(points_nd, labels_n) for space, points_nd in points.items()}
    return {"generalization": generalization_score(features_nD, labels_n, random_state=SEED)} | silhouettes
