"""Where the images lie on the map, and which are most similar to each.

Both work in the first 50 principal components of the features. Shapes: n images, D dimensions, P components.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.embed.feature_matrix import load_features
from icce_ray.metrics.label_free_scores import project_pca, project_umap
from icce_ray.neighbors.search import most_similar
from icce_ray.runtime.machine import has_umap
from icce_ray.sample.training_set import training_rows, training_set
from icce_ray.sample.unit_features import prepare

NUM_SIMILAR = 16
MAX_UMAP_IMAGES = 50_000
MAX_SEARCHED = 200_000
"""With more images on the page, similar ones are not looked for: all pairs are compared."""
CLIPPED_SHARE = 0.002
"""Share of the images on each side that may lie beyond the border of the map; they are drawn on it."""
SEED = 0

Floats = npt.NDArray[np.float32]


def read_features(inputs: Any, image_ids: npt.NDArray[np.int64]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Features (n, D) of images, and whether each has any. A near-duplicate has those of the image trained on instead;
    images outside the sample that was trained on have none, and zeros stand for them.

    Args:
        inputs: artifacts `embed` and `sample`.
    """
    features = load_features(training_set(inputs))
    rows_n = training_rows_of(inputs, image_ids)
    known_n = rows_n >= 0
    found_nD = np.zeros((len(image_ids), features.dim), dtype=np.float32)
    found_nD[known_n] = features.matrix[rows_n[known_n]]
    return found_nD, known_n


def training_rows_of(inputs: Any, image_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The row of each image (n,) among those trained on, that of its leader for a near-duplicate; -1 for none."""
    training = training_rows(inputs)
    if training is not None:
        return training.rows_of(image_ids)
    known = load_features(training_set(inputs)).image_ids
    rows_n = np.minimum(np.searchsorted(known, image_ids), len(known) - 1)
    return np.where(known[rows_n] == image_ids, rows_n, -1)


def lay_out(features_nD: Floats, how: str) -> tuple[npt.NDArray[np.uint16], Floats, str]:
    """Places on the map (n, 2), 0..65535 in both directions; principal components (n, P); and `pca` or `umap`.

    Args:
        how: `auto`, `pca` or `umap`.
    """
    num_images = len(features_nD)
    components_nP = np.zeros((num_images, 2), dtype=np.float32)
    if num_images > 1:
        # Of unit length, as for the neighbour graph: one image with large features must not make all others one dot.
        components_nP = project_pca(prepare(features_nD, center=True)[:], SEED)
    if how == "auto":
        fits = 10 <= num_images <= MAX_UMAP_IMAGES
        how = "umap" if fits and has_umap() else "pca"
    if how == "umap":
        places_n2 = project_umap(components_nP, SEED, n_components=2, n_neighbors=15, min_dist=0.1)
    else:
        places_n2 = np.pad(components_nP[:, :2], ((0, 0), (0, max(0, 2 - components_nP.shape[1]))))
    return _on_grid(places_n2), components_nP, how


def similar_images(components_nP: Floats) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """The most similar images of each, (n, at most NUM_SIMILAR) positions, and their cosines in 255ths, the most
    similar first."""
    num_images = len(components_nP)
    if not 2 <= num_images <= MAX_SEARCHED:
        return np.empty((num_images, 0), dtype=np.int32), np.empty((num_images, 0), dtype=np.uint8)
    similarity, ids = most_similar(prepare(components_nP, center=False), np.arange(num_images), NUM_SIMILAR)
    return ids.astype(np.int32), np.rint(255 * np.clip(similarity, 0, 1)).astype(np.uint8)


def _on_grid(places_n2: Floats) -> npt.NDArray[np.uint16]:
    if not len(places_n2):
        return np.empty((0, 2), dtype=np.uint16)
    low, high = np.quantile(places_n2, [CLIPPED_SHARE, 1 - CLIPPED_SHARE], axis=0)
    centre, half = (low + high) / 2, 1.05 * float((high - low).max()) / 2 or 1.0
    scaled = (places_n2 - centre) / half * 0.5 + 0.5
    return np.asarray(np.rint(65535 * np.clip(scaled, 0, 1)), dtype=np.uint16)
