"""The state of a training as a safetensors file. If its bytes changed on storage, it counts as missing."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import safetensors
import safetensors.torch
import torch

SavedState = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Tensors by name, and JSON-able values."""


def to_bytes(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> bytes:
    """The state as a safetensors file, with a checksum in its header."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(values)
    return safetensors.torch.save(on_cpu, metadata={"values": text, "sha256": _digest(on_cpu, text)})


def from_bytes(data: bytes) -> SavedState | None:
    """The state that :func:`to_bytes` made `data` from; None if the bytes are not those that were written."""
    try:
        tensors = safetensors.torch.load(data)
        header_size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header_size])["__metadata__"]
        is_sound = metadata["sha256"] == _digest(tensors, metadata["values"])
    except (safetensors.SafetensorError, ValueError, KeyError):
        return None
    return (tensors, json.loads(metadata["values"])) if is_sound else None


def _digest(tensors: dict[str, torch.Tensor], values: str) -> str:
    digest = hashlib.sha256(values.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
