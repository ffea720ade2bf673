"""Finished runs and checkpoints of TURTLE on storage. Any number of workers can go on from them."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch

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

    def read(self, run: int) -> tuple[npt.NDArray[np.int32], dict[str, Any]] | None:
        """Labels (N,) and values of a finished run; None if it is not finished."""
        record = self.records.read(_name(run))
        if record is None:
            return None
        data = self._folder.read_bytes(record.files[0].name)
        return np.load(io.BytesIO(data), allow_pickle=False), record.metrics

    def write(self, run: int, labels_N: npt.NDArray[np.int32], values: dict[str, Any]) -> None:
        """Keep a finished run; its checkpoint goes."""
        part = ArtifactWriter(self._folder).write_array(f"{FOLDER_NAME}/{_name(run)}.npy", labels_N)
        self.records.write(_name(run), [part], values)
        self._folder.remove(_checkpoint(run))

    def save_checkpoint(self, run: int, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Replace the checkpoint of a run that is still trained."""
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"values": json.dumps(values), "source": self.records.source}
        self._folder.write_bytes(_checkpoint(run), safetensors.torch.save(on_cpu, metadata=metadata))

    def load_checkpoint(self, run: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and values of the checkpoint; None if there is none that fits."""
        try:
            data = self._folder.read_bytes(_checkpoint(run))
            tensors = safetensors.torch.load(data)
        except (FileNotFoundError, safetensors.SafetensorError):
            return None
        header_size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header_size])["__metadata__"]
        return (tensors, json.loads(metadata["values"])) if metadata["source"] == self.records.source else None

    def clear(self) -> None:
        """Remove everything: the artifact has it now."""
        (self._folder / FOLDER_NAME).clear()
        self.records.clear()

    @property
    def _folder(self) -> Folder:
        return self.records.folder


def _name(run: int) -> str:
    return f"run-{run:05d}"


def _checkpoint(run: int) -> str:
    return f"{FOLDER_NAME}/{_name(run)}.checkpoint.safetensors"
