"""Checkpoints of the trainer. At each, every worker writes a safetensors file with the state of its heads; any number
of workers can resume from them."""

from __future__ import annotations

import json
import re
from typing import Any

import safetensors.torch
import torch

from icce_ray.store import Folder

NAME = re.compile(r"epoch-(\d+)-heads-(\d+)-(\d+)\.safetensors")
FOLDER_NAME = "checkpoints"


class CheckpointFolder:
    """The checkpoints of a run, beside the artifact that it will write."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder / FOLDER_NAME
        self._epochs: list[int] = []

    def save(self, tensors: dict[str, torch.Tensor], values: dict[str, Any], heads: range) -> None:
        """Write the state of `heads` after ``values["epoch"]`` epochs. The worker of head 0 removes the checkpoints of
        all workers but the last two, which are complete: workers save at the same epochs, and wait for each other in
        between."""
        cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        data = safetensors.torch.save(cpu_tensors, metadata={"values": json.dumps(values)})
        name = f"epoch-{values['epoch']:06d}-heads-{heads.start:05d}-{heads.stop:05d}.safetensors"
        self.folder.write_bytes(name, data)
        self._epochs.append(values["epoch"])
        if heads.start == 0 and len(self._epochs) > 1:
            for epoch, _, name in self._files():
                if epoch < self._epochs[-2]:
                    self.folder.remove(name)

    def load(self, heads: range, max_epoch: int | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest state of `heads`, up to `max_epoch`, that all its files can be read for; None if there is none."""
        files = self._files()
        for epoch in sorted({epoch for epoch, _, _ in files}, reverse=True):
            if max_epoch is not None and epoch > max_epoch:
                continue
            found = self._read(heads, [(saved, name) for at, saved, name in files if at == epoch])
            if found is not None:
                self._epochs.append(epoch)
                return found
        return None

    def clear(self) -> None:
        for name in self.folder.names():
            self.folder.remove(name)

    def _read(
        self, heads: range, files: list[tuple[range, str]]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Join the state of `heads` from files, each of which has some of them."""
        joined: list[dict[str, torch.Tensor]] = []
        values: dict[str, Any] = {}
        head = heads.start
        while head < heads.stop:
            found = next(((saved, name) for saved, name in files if head in saved), None)
            if found is None:
                return None
            saved, name = found
            data = self.folder.read_bytes(name)
            try:
                tensors = safetensors.torch.load(data)
            except safetensors.SafetensorError:
                return None
            stop = min(heads.stop, saved.stop)
            rows = slice(head - saved.start, stop - saved.start)
            joined.append({key: tensor[rows] for key, tensor in tensors.items()})
            header_size = int.from_bytes(data[:8], "little")
            values = json.loads(json.loads(data[8 : 8 + header_size])["__metadata__"]["values"])
            head = stop
        return {name: torch.cat([part[name] for part in joined]) for name in joined[0]}, values

    def _files(self) -> list[tuple[int, range, str]]:
        """Epoch, heads and name of every checkpoint file."""
        matches = [match for name in self.folder.names() if (match := NAME.fullmatch(name))]
        return [(int(match[1]), range(int(match[2]), int(match[3])), match[0]) for match in matches]
