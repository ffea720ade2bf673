"""How good the clusters of a trial are, judged without labels (docs/METHOD.md, "Scores without labels")."""

from typing import Any

import numpy as np

from icce_ray.config import Config
from icce_ray.embed.feature_matrix import load_features
from icce_ray.metrics.label_free_scores import label_free_scores
from icce_ray.sample.training_set import training_set
from icce_ray.stage import StageContext
from icce_ray.sweeps.silhouette_spaces import SEED, sample, spaces


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Score the consensus; nothing but the metrics is kept. Returns anmi, generalization, silhouette_pca, and
    silhouette_umap if UMAP is installed; None where a score is not defined, such as for a single cluster;
    num_clusters_used."""
    consensus = context.inputs["consensus"]
    labels_N = consensus.read_array("labels.npy")
    matrix_ND = load_features(training_set(context.inputs)).matrix
    rows = sample(len(matrix_ND))
    points = {space: context.inputs["silhouette_spaces"].read_array(f"{space}.npy") for space in spaces()}
    metrics = label_free_scores(np.array(matrix_ND[rows], dtype=np.float32), points, labels_N[rows], random_state=SEED)
    return {"anmi": consensus.metrics["anmi"], **metrics, "num_clusters_used": len(np.unique(labels_N[labels_N >= 0]))}
