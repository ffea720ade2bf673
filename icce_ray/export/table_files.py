"""Tables of the images: ``assignments.csv``, with all columns of the assignments and a row per image, and files for
cleanlab: ``labels.npy`` (N,) int64, ``pred_probs.npy`` (N, K) float32, and ``images.csv``, their rows.

The labels are the clusters, without noise; the probabilities are those of the run's classifier. cleanlab then finds
the images whose cluster the classifier doubts::

    issues = cleanlab.filter.find_label_issues(np.load("labels.npy"), np.load("pred_probs.npy"))
"""

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from numpy.lib import format as npy

from icce_ray.classifier.linear import MODEL_NAME, LinearClassifier
from icce_ray.export.export_run import ExportTask, Written
from icce_ray.export.selected_images import SelectedImages


def write_csv(source: SelectedImages, task: ExportTask) -> Written:
    num_images, num_wanted = 0, source.count()
    with task.output.writing("assignments.csv") as file, pacsv.CSVWriter(file, source.schema) as writer:
        for table in source.tables():
            writer.write_table(table)
            num_images += len(table)
            task.progress.update(num_images, num_wanted)
    return Written(num_images)


def write_for_cleanlab(source: SelectedImages, task: ExportTask) -> Written:
    classifier = LinearClassifier.from_bytes(source.find("classifier").read_bytes(MODEL_NAME))
    num_wanted, num_images = sum(int((table["cluster"].to_numpy() >= 0).sum()) for table in source.tables()), 0
    with (
        task.output.writing("labels.npy") as labels,
        task.output.writing("pred_probs.npy") as pred_probs,
        task.output.writing("images.csv") as images,
        pacsv.CSVWriter(images, source.schema) as writer,
    ):
        for file, shape, kind in (
            (labels, (num_wanted,), np.int64),
            (pred_probs, (num_wanted, source.num_clusters), np.float32),
        ):
            header = {"descr": npy.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": shape}
            npy.write_array_header_1_0(file, header)
        for selected, selected_nD in source.tables_with_features():
            rows = np.flatnonzero(selected["cluster"].to_numpy() >= 0)
            table, features_nD = selected.take(pa.array(rows)), selected_nD[rows]
            labels.write(table["cluster"].to_numpy().astype(np.int64).tobytes())
            pred_probs.write(classifier.predict_proba(features_nD).tobytes())
            writer.write_table(table)
            num_images += len(table)
            task.progress.update(num_images, num_wanted)
    return Written(num_images)
