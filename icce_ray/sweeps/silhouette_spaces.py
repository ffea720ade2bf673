"""The spaces that silhouettes are measured in: PCA, and UMAP if umap-learn is installed. They are made once for all
trials that share their features, of a sample of the images, since a silhouette compares all pairs
(docs/METHOD.md, "Scores without labels").
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.config import Config
from icce_ray.embed.feature_matrix import load_features
from icce_ray.random_numbers import sampled_rows
from icce_ray.runtime.machine import has_umap
from icce_ray.sample.training_set import training_set
from icce_ray.stage import StageContext

MAX_IMAGES = 5_000
SEED = 0
"""The same for all trials, whatever their seed, so that their scores can be compared."""


def spaces() -> list[str]:
    """Names of the spaces that can be made here."""
    return ["pca", "umap"] if has_umap() else ["pca"]


def sample(num_images: int) -> npt.NDArray[np.int64]:
    """The rows that are scored, ascending: all of them up to MAX_IMAGES."""
    return sampled_rows(num_images, MAX_IMAGES, SEED)


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Write pca.npy and, if it can be made, umap.npy: (n, at most 50) float32, the rows of :func:`sample`. Returns
    num_images (in the sample)."""
    # Imported here: scikit-learn takes a second, and processes that wait for trials only ask for the names.
    from icce_ray.metrics.label_free_scores import PROJECTIONS

    matrix_ND = load_features(training_set(context.inputs)).matrix
    rows = sample(len(matrix_ND))
    features_nD = np.array(matrix_ND[rows], dtype=np.float32)
    for done, space in enumerate(spaces()):
        context.progress.update(done, len(spaces()), space)
        context.output.write_array(f"{space}.npy", PROJECTIONS[space](features_nD, SEED))
    return {"num_images": len(rows)}
