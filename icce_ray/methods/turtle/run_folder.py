"""Finished blocks of runs and checkpoints of TURTLE on storage. Any number of workers can go on from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from icce_ray.methods.saved_state import SavedState, from_bytes, to_bytes
from icce_ray.store import ArtifactWriter, Folder
from icce_ray.store.part_records import PartRecords

FOLDER_NAME = "runs"


@dataclass(frozen=True)
class RunFolder:
    """The runs beside the artifact that they will make.

    Args:
        records: of the artifact; their source is what the runs are made from.
    """

    records: PartRecords

    def read(self, runs: range) -> SavedState | None:
        """A finished block; None if it is not finished, or damaged."""
        record = self.records.read(_name(runs))
        return None if record is None else from_bytes(self._folder.read_bytes(record.files[0].name))

    def write(self, runs: range, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Keep a finished block; its checkpoint goes."""
        name = f"{FOLDER_NAME}/{_name(runs)}.safetensors"
        part = ArtifactWriter(self._folder).write_bytes(name, to_bytes(tensors, values))
        self.records.write(_name(runs), [part], {})
        self._folder.remove(_checkpoint(runs))

    def save_checkpoint(self, runs: range, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Replace the checkpoint of a block that is still trained."""
        state = to_bytes(tensors, {"source": self.records.source, "values": values})
        self._folder.write_bytes(_checkpoint(runs), state)

    def load_checkpoint(self, runs: range) -> SavedState | None:
        """The checkpoint of a block; None if there is none that fits, or it is damaged."""
        try:
            state = from_bytes(self._folder.read_bytes(_checkpoint(runs)))
        except FileNotFoundError:
            return None
        if state is None or state[1]["source"] != self.records.source:
            return None
        return state[0], state[1]["values"]

    def clear(self) -> None:
        """Remove everything: the artifact has it now."""
        (self._folder / FOLDER_NAME).clear()
        self.records.clear()

    @property
    def _folder(self) -> Folder:
        return self.records.folder


def _name(runs: range) -> str:
    return f"runs-{runs.start:05d}-{runs.stop:05d}"


def _checkpoint(runs: range) -> str:
    return f"{FOLDER_NAME}/{_name(runs)}.checkpoint.safetensors"
