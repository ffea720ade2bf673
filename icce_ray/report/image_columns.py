"""The data of the images on the page: a column for each value, and files with their paths and neighbours.

The map and the neighbours are made in the first 50 principal components of the features. Shapes: n images, D
dimensions, P components, M methods.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.config import Config
from icce_ray.embed.feature_matrix import load_features
from icce_ray.evaluate.run_scores import METHODS_NAME, TRUE_LABELS_NAME
from icce_ray.metrics.label_free_scores import project_pca, project_umap
from icce_ray.neighbors.search import most_similar
from icce_ray.report.page_files import PageFiles, packed
from icce_ray.runtime.machine import has_umap
from icce_ray.sample.training_set import training_rows_of, training_set
from icce_ray.sample.unit_features import prepare
from icce_ray.store import Artifact

ROWS_PER_FILE = 1024
"""Images whose paths and neighbours are in one data file."""
MAX_CLASSES = 1_000
"""With more true classes, images are not coloured by them."""
NO_SHARE = 255
"""Stands for an unknown share; others are in 250ths."""
NOT_CLUSTERED = -2
"""Stands for the cluster that a method gave an image that it was not shown."""
NUM_SIMILAR = 16
MAX_UMAP_IMAGES = 50_000
MAX_SEARCHED = 200_000
"""With more images on the page, similar ones are not looked for: all pairs are compared."""
CLIPPED_SHARE = 0.002
"""Share of the images on each side that may lie beyond the border of the map; they are drawn on it."""
SEED = 0
Floats = npt.NDArray[np.float32]


def write_images(
    config: Config,
    inputs: Mapping[str, Artifact],
    shown: pa.Table,
    groups: list[npt.NDArray[np.int64]],
    position: Mapping[int, int],
    files: PageFiles,
) -> tuple[str, list[str]]:
    """Write the columns of the images on the page, their paths and neighbours. Returns the name of the map, and the
    names of the true classes."""
    ids_n = shown["image_id"].to_numpy()
    features_nD, known_n = read_features(inputs, ids_n)
    known = np.flatnonzero(known_n)
    places_n2 = np.zeros((len(ids_n), 2), dtype=np.uint16)
    places_n2[known], components_nP, map_name = lay_out(features_nD[known], config.report.map)
    similar, cosines = similar_images(components_nP)
    similar_nM = np.full((len(ids_n), similar.shape[1]), -1, dtype=np.int32)
    cosine_nM = np.zeros((len(ids_n), similar.shape[1]), dtype=np.uint8)
    similar_nM[known], cosine_nM[known] = known[similar].astype(np.int32), cosines
    group_n = np.full(len(ids_n), -1, dtype=np.int32)
    for number, group in enumerate(groups):
        group_n[[position[image] for image in group.tolist()]] = number
    columns = {
        "cluster": shown["cluster"].to_numpy(),
        "second": shown["second_choice"].to_numpy(),
        "agreement": _shares(shown["agreement"].to_numpy()),
        "probability": _shares(shown["consensus_probability"].to_numpy()),
        "distance": shown["outlier_score"].to_numpy().astype(np.float32),
        "outlier": shown["is_outlier"].to_numpy().astype(np.uint8),
        "on_map": known_n.astype(np.uint8),
        "x": places_n2[:, 0],
        "y": places_n2[:, 1],
        "group": group_n,
    }
    names, label_n = _true_labels(inputs, ids_n)
    if names:
        columns["label"] = label_n
    files.add_json("columns", {name: [str(values.dtype), packed(values)] for name, values in columns.items()})
    if METHODS_NAME in inputs["evaluate"].part_names():
        rows_n, labels_MN = training_rows_of(inputs, ids_n), inputs["evaluate"].read_array(METHODS_NAME)
        labels_Mn = np.where(rows_n >= 0, labels_MN[:, rows_n], NOT_CLUSTERED).astype(np.int32)
        files.add_json("clusterings", [packed(labels_n) for labels_n in labels_Mn])
    uris = shown["uri"].to_pylist()
    for number, start in enumerate(range(0, len(ids_n), ROWS_PER_FILE)):
        rows = slice(start, start + ROWS_PER_FILE)
        value = {"ids": ids_n[rows].tolist(), "uris": uris[rows]}
        value |= {"similar": packed(similar_nM[rows]), "cosine": packed(cosine_nM[rows])}
        files.add_json(f"rows-{number:05d}", value)
    return map_name, names


def _true_labels(
    inputs: Mapping[str, Artifact], ids_n: npt.NDArray[np.int64]
) -> tuple[list[str], npt.NDArray[np.int32]]:
    """The names of the true classes and the class of each image, -1 if unknown; no names if no labels were given."""
    evaluate = inputs["evaluate"]
    label_n = np.full(len(ids_n), -1, dtype=np.int32)
    if TRUE_LABELS_NAME not in evaluate.part_names():
        return [], label_n
    table = evaluate.read_table(TRUE_LABELS_NAME).combine_chunks()
    column = table["label"].combine_chunks()
    names = column.dictionary.to_pylist()
    if len(names) > MAX_CLASSES:
        return [], label_n
    labelled = table["image_id"].to_numpy()
    place_n = np.minimum(np.searchsorted(labelled, ids_n), len(labelled) - 1)
    known = labelled[place_n] == ids_n
    label_n[known] = column.indices.to_numpy()[place_n[known]]
    return names, label_n


def _shares(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Shares in 250ths; NO_SHARE for NaN."""
    known = np.isfinite(values)
    return np.where(known, np.rint(250 * np.where(known, values, 0)), NO_SHARE).astype(np.uint8)


def read_features(inputs: Any, image_ids: npt.NDArray[np.int64]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Features (n, D) of images, and whether each has any. A near-duplicate has those of the image trained on instead;
    images outside the sample that was trained on have none, and zeros stand for them."""
    features = load_features(training_set(inputs))
    rows_n = training_rows_of(inputs, image_ids)
    known_n = rows_n >= 0
    found_nD = np.zeros((len(image_ids), features.dim), dtype=np.float32)
    found_nD[known_n] = features.matrix[rows_n[known_n]]
    return found_nD, known_n


def lay_out(features_nD: Floats, how: str) -> tuple[npt.NDArray[np.uint16], Floats, str]:
    """Places on the map (n, 2), 0..65535 in both directions; principal components (n, P); and `pca` or `umap`, as asked
    for, or chosen if `how` is `auto`."""
    num_images = len(features_nD)
    components_nP = np.zeros((num_images, 2), dtype=np.float32)
    if num_images > 1:
        # Unit length, as in the neighbour graph, so that one image with large features does not squeeze all others
        # into one dot.
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
