"""Finished blocks of runs and checkpoints of TURTLE on storage. Any number of workers can go on from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch

from icce_ray.store import ArtifactWriter, Folder
from icce_ray.store.part_records import PartRecords

FOLDER_NAME = "runs"

Saved = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Tensors by name, and JSON-able values."""


@dataclass(frozen=True)
class RunFolder:
    """The runs beside the artifact that they will make.

    Args:
        records: of the artifact; their source is what the runs are made from.
    """

    records: PartRecords

    def read(self, runs: range) -> Saved | None:
        """A finished block; None if it is not finished."""
        record = self.records.read(_name(runs))
        if record is None:
            return None
        return safetensors.torch.load(self._folder.read_bytes(record.files[0].name)), record.metrics

    def write(self, runs: range, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Keep a finished block; its checkpoint goes."""
        data = safetensors.torch.save(_on_cpu(tensors))
        part = ArtifactWriter(self._folder).write_bytes(f"{FOLDER_NAME}/{_name(runs)}.safetensors", data)
        self.records.write(_name(runs), [part], values)
        self._folder.remove(_checkpoint(runs))

    def save_checkpoint(self, runs: range, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Replace the checkpoint of a block that is still trained."""
        metadata = {"values": json.dumps(values), "source": self.records.source}
        self._folder.write_bytes(_checkpoint(runs), safetensors.torch.save(_on_cpu(tensors), metadata=metadata))

    def load_checkpoint(self, runs: range) -> Saved | None:
        """The checkpoint of a block; None if there is none that fits."""
        try:
            data = self._folder.read_bytes(_checkpoint(runs))
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


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _name(runs: range) -> str:
    return f"runs-{runs.start:05d}-{runs.stop:05d}"


def _checkpoint(runs: range) -> str:
    return f"{FOLDER_NAME}/{_name(runs)}.checkpoint.safetensors"
