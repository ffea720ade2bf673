"""Labels one part: reads its embeddings, writes its assignments and its candidates for exemplars.

Images that took part in the consensus keep its label, so the assignments equal ``ICCE.labels_``; all others get the
classifier's (docs/METHOD.md, "Self-training"). Noise stays noise. The labeler pickles: it holds artifacts and reads
them when they are first used.

Shapes: n images, D dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.assign.drift import Totals
from icce_ray.assign.embeddings_to_label import AssignPart, Source
from icce_ray.assign.exemplars import CANDIDATES_SCHEMA, candidates_table
from icce_ray.assign.new_clusters import outliers_table
from icce_ray.classifier.linear import MODEL_NAME, UNKNOWN, LinearClassifier, Prediction
from icce_ray.corrections.stage import consensus_of, moved_clusters
from icce_ray.sample.training_set import TrainingRows, training_rows
from icce_ray.store import Artifact, ArtifactWriter, Folder, Part

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
ASSIGNMENTS_FOLDER = "assignments/"
"""Holds nothing but Parquet files of one schema, so that pandas can read the folder as it is."""
CANDIDATES_FOLDER = "candidates/"
OUTLIERS_FOLDER = "outliers/"
ERRORS_FOLDER = "errors/"


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


@dataclass(repr=False, eq=False)
class PartLabeler:
    """Labels the parts of `source` and writes them to `folder`. `inputs` are the artifact ``classifier``; for a run's
    own images also ``consensus``, and ``sample`` if only a sample was trained on. `first_id` is added to the ids of the
    source."""

    source: Source
    folder: Folder
    inputs: Mapping[str, Artifact]
    num_exemplars: int
    seed: int
    first_id: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("classifier", "_consensus", "_moved")}

    def label(self, part: AssignPart) -> tuple[list[Part], Totals]:
        """Label the images of a part and write its files. Raises InputError: embeddings that cannot be used;
        DamagedArtifactError: an input is not what its manifest says."""
        tables, candidates, totals = [SCHEMA.empty_table()], [CANDIDATES_SCHEMA.empty_table()], []
        outliers, errors = list[pa.Table](), list[pa.Table]()
        row = part.first_row
        for image_ids, features_nD, uris, failed in self.source.read(part):
            errors += [failed] if failed is not None else []
            consensus_n, agreement_n = self._consensus_of(image_ids, row)
            # Images that took part in the consensus keep its label.
            prediction = self.classifier.label(features_nD, consensus_n)
            tables.append(assignments_table(image_ids + self.first_id, uris, prediction, agreement_n))
            candidates.append(
                candidates_table(
                    tables[-1],
                    features_nD,
                    prediction,
                    self.classifier,
                    num_images=self.source.num_rows,
                    num_exemplars=self.num_exemplars,
                    seed=self.seed,
                )
            )
            if "consensus" not in self.inputs:
                outliers.append(outliers_table(tables[-1], features_nD, self.classifier, self.seed))
            num_in_consensus = int((consensus_n != UNKNOWN).sum())
            totals.append(Totals.of(prediction, self.classifier.num_clusters, num_in_consensus=num_in_consensus))
            row += len(image_ids)
        writer = ArtifactWriter(self.folder)
        files = [
            writer.write_table(f"{ASSIGNMENTS_FOLDER}{part.name}.parquet", pa.concat_tables(tables)),
            writer.write_table(f"{CANDIDATES_FOLDER}{part.name}.parquet", pa.concat_tables(candidates)),
        ]
        if outliers:
            files.append(writer.write_table(f"{OUTLIERS_FOLDER}{part.name}.parquet", pa.concat_tables(outliers)))
        if errors:
            files.append(writer.write_table(f"{ERRORS_FOLDER}{part.name}.parquet", pa.concat_tables(errors)))
        return files, Totals.add(totals)

    @cached_property
    def classifier(self) -> LinearClassifier:
        return LinearClassifier.from_bytes(self.inputs["classifier"].read_bytes(MODEL_NAME))

    @cached_property
    def _consensus(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], TrainingRows | None]:
        """Labels and agreement of the images trained on, and which these are if not all."""
        consensus = consensus_of(self.inputs)
        return consensus.read_array("labels.npy"), consensus.read_array("agreement.npy"), training_rows(self.inputs)

    @cached_property
    def _moved(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        return moved_clusters(self.inputs)

    def _consensus_of(
        self, image_ids: npt.NDArray[np.int64], first_row: int
    ) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.floating]]:
        """Consensus label and agreement of some consecutive images: a near-duplicate has those of its leader; UNKNOWN
        and NaN for images outside the sample."""
        if "consensus" not in self.inputs:
            return np.full(len(image_ids), UNKNOWN), np.full(len(image_ids), np.nan, dtype=np.float32)
        labels_N, agreement_N, training = self._consensus
        rows_n = np.arange(first_row, first_row + len(image_ids))
        if training is not None:
            rows_n = training.rows_of(image_ids)
        labels_n = np.where(rows_n >= 0, labels_N[rows_n], UNKNOWN)
        agreement_n = np.where((rows_n >= 0) & (labels_n >= 0), agreement_N[rows_n], np.nan).astype(np.float32)
        moved_ids, moved_to = self._moved
        moved = np.flatnonzero(np.isin(image_ids, moved_ids))
        moved_labels = moved_to[np.searchsorted(moved_ids, image_ids[moved])]
        # The clusterings voted on the image that was trained on, but not on its near-duplicate.
        agreement_n[moved[moved_labels != labels_n[moved]]] = np.nan
        labels_n[moved] = moved_labels
        return labels_n, agreement_n
