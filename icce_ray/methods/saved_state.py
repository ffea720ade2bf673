"""The state of a training on storage: tensors in a safetensors file, and a record with the values."""

from typing import Any

import safetensors.torch
import torch

from icce_ray.store import ArtifactWriter
from icce_ray.store.part_records import PartRecords

SavedState = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Tensors by name, and JSON-able values; floats are finite."""


def save_state(
    records: PartRecords, name: str, tensors: dict[str, torch.Tensor], values: dict[str, Any], step: str = ""
) -> None:
    """Replace the state `name`. If it is saved again, `step` differs: the earlier file stays until the record is
    written."""
    on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    data = safetensors.torch.save(on_cpu)
    file = ArtifactWriter(records.folder).write_bytes(f"{name}{step}.safetensors", data)
    records.write(name, [file], values)
    for other in records.folder.names():
        if other.startswith(name) and other != file.name:
            records.folder.remove(other)


def read_state(records: PartRecords, name: str) -> SavedState | None:
    """The state `name`; None if it is missing or damaged."""
    record = records.read(name)
    if record is None:
        return None
    return safetensors.torch.load(records.folder.read_bytes(record.files[0].name)), record.metrics
