"""What an actor of the assign stage does with a part: read its rows, label them, write the assignments.

One writer is for the images of a run, which have a consensus; the other for new images, which have only the model.
Writers pickle: they hold artifacts, and read them when they are first used.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.assign import exemplar_candidates as candidates
from icce_ray.assign.assignment_parts import AssignPart, FinishedPart, Tally, finish_part
from icce_ray.assign.labeling import NEW_SCHEMA, assignments_table, label_images, new_table
from icce_ray.assign.sources import Source
from icce_ray.classifier.linear import MODEL_NAME, LinearClassifier
from icce_ray.sample.draw import sampled_ids, spread
from icce_ray.store import Artifact, Folder


class Writer(Protocol):
    source: Source
    folder: Folder

    def write(self, wanted: AssignPart) -> FinishedPart:
        """Label the images of a part, write it, then the note that it is finished."""


class RunWriter:
    """For the images of the run itself.

    Args:
        consensus: the artifact; its labels and agreement count by row of the matrix that was trained on.
        exemplar_rows: rows of that matrix.
        sample: the artifact that says which images were trained on; None where all were.
    """

    def __init__(
        self,
        source: Source,
        folder: Folder,
        classifier: Artifact,
        consensus: Artifact,
        exemplar_rows: npt.NDArray[np.int64],
        sample: Artifact | None = None,
    ) -> None:
        self.source = source
        self.folder = folder
        self._classifier = classifier
        self._consensus = consensus
        self._exemplar_rows = exemplar_rows
        self._sample = sample

    def write(self, wanted: AssignPart) -> FinishedPart:
        consensus_N, agreement_N = (self._consensus.read_array(name) for name in ("labels.npy", "agreement.npy"))
        tables, tally, row = [], Tally(), wanted.first_row
        for image_ids, features_nD, uris in self.source.read(wanted):
            rows_n = np.arange(row, row + len(image_ids))
            if self._trained_ids is not None:
                rows_n = spread(np.arange(len(self._trained_ids)), self._trained_ids, image_ids, -1)
            consensus_n = np.where(rows_n >= 0, consensus_N[rows_n], -1)
            prediction, agreement_n = label_images(self.classifier, features_nD, consensus_n, agreement_N[rows_n])
            is_exemplar = np.isin(rows_n, self._exemplar_rows)
            tables.append(assignments_table(image_ids, uris, prediction, agreement_n, is_exemplar))
            num_in_consensus = int(np.isfinite(agreement_n).sum())
            tally += Tally.of(prediction, num_in_consensus=num_in_consensus, num_exemplars=int(is_exemplar.sum()))
            row += len(image_ids)
        return finish_part(wanted, self.folder, pa.concat_tables(tables), tally)

    @cached_property
    def _trained_ids(self) -> npt.NDArray[np.int64] | None:
        return None if self._sample is None else sampled_ids({"sample": self._sample})

    @cached_property
    def classifier(self) -> LinearClassifier:
        return LinearClassifier.from_bytes(self._classifier.read_bytes(MODEL_NAME))


class NewWriter:
    """For images that the model has not seen.

    Args:
        num_images: in all parts together.
        num_exemplars: wanted per cluster.
        seed: of the draw of candidates.
    """

    def __init__(
        self, source: Source, folder: Folder, classifier: Artifact, *, num_images: int, num_exemplars: int, seed: int
    ) -> None:
        self.source = source
        self.folder = folder
        self._artifact = classifier
        self._num_images = num_images
        self._num_exemplars = num_exemplars
        self._seed = seed

    def write(self, wanted: AssignPart) -> FinishedPart:
        classifier, cutoffs_K = self._model
        tables, shortlists, tally = [NEW_SCHEMA.empty_table()], [candidates.SCHEMA.empty_table()], Tally()
        for image_ids, features_nD, uris in self.source.read(wanted):
            prediction = classifier.label(features_nD)
            tables.append(new_table(image_ids, uris, prediction))
            shortlists.append(
                candidates.candidates_table(image_ids, uris, features_nD, prediction, classifier, cutoffs_K, self._seed)
            )
            tally += Tally.of(prediction)
        beside = candidates_name(wanted), pa.concat_tables(shortlists)
        return finish_part(wanted, self.folder, pa.concat_tables(tables), tally, beside)

    @cached_property
    def _model(self) -> tuple[LinearClassifier, npt.NDArray[Any]]:
        classifier = LinearClassifier.from_bytes(self._artifact.read_bytes(MODEL_NAME))
        return classifier, candidates.cutoffs(classifier, self._num_images, self._num_exemplars)


def candidates_name(wanted: AssignPart) -> str:
    return f"candidates/{wanted.stem}.parquet"
