"""Which cluster an image gets, how sure that is, and the tables that say so (METHOD section 4).

Images that took part in the consensus keep its label, so that the assignments equal ``ICCE.labels_``; all others get
the classifier's. Measured: the classifier mends labels that are wrong at random (digits, 20% redrawn: 81 to 95% right)
and hardly changes the errors of a clustering, which follow the features (k-means' labels: within 1 point either way).

Shapes: n images, D dims, K clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.classifier.linear import LinearClassifier, Prediction

CONSENSUS_WINS = True
"""Whether an image that took part in the consensus keeps its label; False: the classifier labels all."""

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("cluster", pa.int32()),
        ("confidence", pa.float32()),
        ("agreement", pa.float32()),
        ("second_choice", pa.int32()),
        ("is_exemplar", pa.bool_()),
        ("is_outlier", pa.bool_()),
    ]
)
"""Of the images of the run itself. `agreement` is null for those that took no part in the consensus."""

NEW_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("cluster", pa.int32()),
        ("confidence", pa.float32()),
        ("second_choice", pa.int32()),
        ("outlier_score", pa.float32()),
        ("is_outlier", pa.bool_()),
    ]
)
"""Of images that a finished run's model labels."""


def label_images(
    classifier: LinearClassifier,
    features_nD: npt.NDArray[np.floating],
    consensus_n: npt.NDArray[np.integer],
    agreement_n: npt.NDArray[np.floating],
) -> tuple[Prediction, npt.NDArray[np.float32]]:
    """Label images of the run.

    Args:
        classifier: with K of at least 2.
        features_nD: the same features that the classifier was trained on.
        consensus_n: consensus labels, -1 for images that took no part.
        agreement_n: of the consensus.

    Returns:
        What is known of them; and the agreement, (n,) float32, NaN for images that took no part.

    Raises:
        InputError: features of another number of dimensions.
    """
    prediction = classifier.label(features_nD, consensus_n if CONSENSUS_WINS else None)
    return prediction, np.where(consensus_n >= 0, agreement_n, np.nan).astype(np.float32)


def assignments_table(
    image_ids: npt.NDArray[np.int64],
    uris: Any,
    prediction: Prediction,
    agreement_n: npt.NDArray[np.float32],
    is_exemplar_n: npt.NDArray[np.bool_],
) -> pa.Table:
    """Assignments of the run's own images, in the order given; NaN agreement becomes null."""
    columns = [
        pa.array(image_ids),
        uris,
        pa.array(prediction.cluster),
        pa.array(prediction.confidence),
        pa.array(agreement_n, from_pandas=True),
        pa.array(prediction.second_choice),
        pa.array(is_exemplar_n),
        pa.array(prediction.is_outlier),
    ]
    return pa.table(columns, schema=SCHEMA)


def new_table(image_ids: npt.NDArray[np.int64], uris: Any, prediction: Prediction) -> pa.Table:
    """Assignments of images that were not in the run, in the order given."""
    columns = [
        pa.array(image_ids),
        uris,
        pa.array(prediction.cluster),
        pa.array(prediction.confidence),
        pa.array(prediction.second_choice),
        pa.array(prediction.outlier_score),
        pa.array(prediction.is_outlier),
    ]
    return pa.table(columns, schema=NEW_SCHEMA)
