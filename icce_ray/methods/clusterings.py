"""The result of every method: several clusterings of the same images, as one label matrix."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.store import Artifact, ArtifactWriter

LABELS_NAME = "label_matrix.npy"
RECORD_NAME = "clusterings.json"


@dataclass(frozen=True)
class Clusterings:
    """H clusterings of N images."""

    labels_HN: npt.NDArray[np.int32]
    """Cluster of each image in each clustering; -1 where it has none."""
    losses_H: npt.NDArray[np.float64] | None = None
    """A loss for each clustering, the lower the better; None if the method has none."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Further files of the method by name, such as its weights."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Losses over the training: a row for each epoch, with at least `loss`; empty if nothing was trained."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able facts about the result, stored with the losses."""

    def write(self, output: ArtifactWriter) -> None:
        """Write label_matrix.npy (H x N int32), clusterings.json (losses, history and notes) and the files."""
        output.write_array(LABELS_NAME, self.labels_HN)
        losses = None if self.losses_H is None else self.losses_H.tolist()
        output.write_json(RECORD_NAME, {"losses": losses, "history": self.history} | dict(self.notes))
        for name, data in self.files.items():
            output.write_bytes(name, data)


def read_losses(artifact: Artifact) -> npt.NDArray[np.float64] | None:
    """The loss of each clustering (H,); None if the method has none."""
    losses = artifact.read_json(RECORD_NAME)["losses"]
    return None if losses is None else np.asarray(losses, dtype=np.float64)


def read_history(artifact: Artifact) -> list[dict[str, Any]]:
    """Losses over the training, a row for each epoch."""
    history: list[dict[str, Any]] = artifact.read_json(RECORD_NAME)["history"]
    return history
