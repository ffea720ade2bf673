"""The cluster of each image, how sure it is, and the table that holds them.

Images that took part in the consensus keep its label, so the assignments equal ``ICCE.labels_``; all others get the
classifier's (docs/METHOD.md, "Self-training"). Noise stays noise.

Shapes: n images, D dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.classifier.linear import Prediction

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("cluster", pa.int32()),
        ("agreement", pa.float32()),
        ("consensus_probability", pa.float32()),
        ("second_choice", pa.int32()),
        ("outlier_score", pa.float32()),
        ("is_outlier", pa.bool_()),
    ]
)
"""Columns of the assignments, for a run's images and for new ones.

`cluster` is -1 for noise, images that the method left without a cluster; their `consensus_probability` is 0 and their
`second_choice` the cluster that the classifier would give. `agreement`: share of the clusterings that agree with
`cluster`, null for noise and for images that took no part in the consensus. `consensus_probability`: calibrated
probability, by the classifier, that `cluster` is the image's cluster in the consensus.
"""


def assignments_table(
    image_ids: npt.NDArray[np.int64], uris: Any, prediction: Prediction, agreement_n: npt.NDArray[np.floating]
) -> pa.Table:
    """The assignments of n images, in the order given. NaN agreement becomes null."""
    columns = [
        pa.array(image_ids),
        uris,
        pa.array(prediction.cluster),
        pa.array(agreement_n, pa.float32(), from_pandas=True),
        pa.array(prediction.consensus_probability),
        pa.array(prediction.second_choice),
        pa.array(prediction.outlier_score),
        pa.array(prediction.is_outlier),
    ]
    return pa.table(columns, schema=SCHEMA)
