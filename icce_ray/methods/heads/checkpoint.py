"""Checkpoints of the trainer: one safetensors file each, written atomically, the last two kept. Imports torch where it
is needed: who only clears them need not wait for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from icce_ray.store import ArtifactWriter, Folder

if TYPE_CHECKING:
    import torch

NUM_KEPT = 2


class CheckpointFolder:
    """Checkpoints named by epoch in one folder."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    @classmethod
    def beside(cls, output: ArtifactWriter) -> CheckpointFolder:
        """Where the stage that writes `output` keeps its checkpoints until it is finished."""
        return cls(output.folder / "checkpoints")

    def save(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Write the checkpoint of ``values["epoch"]`` and drop all but the last two."""
        import safetensors.torch

        cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        data = safetensors.torch.save(cpu_tensors, metadata={"values": json.dumps(values)})
        self.folder.write_bytes(f"epoch-{values['epoch']:06d}.safetensors", data)
        for name in self._names()[:-NUM_KEPT]:
            self.folder.remove(name)

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest checkpoint that can be read, or None."""
        import safetensors.torch

        for name in reversed(self._names()):
            data = self.folder.read_bytes(name)
            try:
                tensors = safetensors.torch.load(data)
            except safetensors.SafetensorError:
                continue
            header_size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + header_size])
            return tensors, json.loads(header["__metadata__"]["values"])
        return None

    def clear(self) -> None:
        for name in self._names():
            self.folder.remove(name)

    def _names(self) -> list[str]:
        return [name for name in self.folder.names() if name.startswith("epoch-") and name.endswith(".safetensors")]
