"""The data of the images on the page: a column for each value, and files with their paths and neighbours."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.config import Config
from icce_ray.evaluate.run_scores import LABELS_NAME, METHODS_NAME
from icce_ray.report.image_map import lay_out, read_features, similar_images, training_rows_of
from icce_ray.report.page_files import PageFiles, packed
from icce_ray.store import Artifact

ROWS_PER_FILE = 1024
"""Images whose paths and neighbours are in one data file."""
MAX_CLASSES = 1_000
"""With more true classes, images are not coloured by them."""
NO_SHARE = 255
"""Stands for an unknown share; others are in 250ths."""
NOT_CLUSTERED = -2
"""Stands for the cluster that a method gave an image that it was not shown."""


def write_images(
    config: Config,
    inputs: Mapping[str, Artifact],
    shown: pa.Table,
    groups: list[npt.NDArray[np.int64]],
    position: Mapping[int, int],
    files: PageFiles,
) -> str:
    """Write the columns of the images on the page, their paths and neighbours. Returns the name of the map."""
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
    names, label_n = true_labels(inputs, ids_n)
    if names:
        columns["label"] = label_n
    files.add_json("columns", {name: [str(values.dtype), packed(values)] for name, values in columns.items()})
    if METHODS_NAME in inputs["evaluate"].part_names():
        files.add_json("clusterings", [packed(labels_n) for labels_n in _method_labels(inputs, ids_n)])
    uris = shown["uri"].to_pylist()
    for number, start in enumerate(range(0, len(ids_n), ROWS_PER_FILE)):
        rows = slice(start, start + ROWS_PER_FILE)
        value = {"ids": ids_n[rows].tolist(), "uris": uris[rows]}
        value |= {"similar": packed(similar_nM[rows]), "cosine": packed(cosine_nM[rows])}
        files.add_json(f"rows-{number:05d}", value)
    return map_name


def _method_labels(inputs: Mapping[str, Artifact], ids_n: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The cluster of each image by each method, (M, n): -1 for noise, NOT_CLUSTERED for an image it was not shown."""
    labels_MN = inputs["evaluate"].read_array(METHODS_NAME)
    rows_n = training_rows_of(inputs, ids_n)
    return np.where(rows_n >= 0, labels_MN[:, rows_n], NOT_CLUSTERED).astype(np.int32)


def true_labels(
    inputs: Mapping[str, Artifact], ids_n: npt.NDArray[np.int64]
) -> tuple[list[str], npt.NDArray[np.int32]]:
    """The names of the true classes and the class of each image, -1 if unknown; no names if no labels were given."""
    evaluate = inputs["evaluate"]
    label_n = np.full(len(ids_n), -1, dtype=np.int32)
    if LABELS_NAME not in evaluate.part_names():
        return [], label_n
    table = evaluate.read_table(LABELS_NAME).combine_chunks()
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
