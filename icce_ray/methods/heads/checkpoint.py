"""What a training leaves in the artifact's folder: checkpoints, and live metrics, one JSON object per epoch.

At each checkpoint, every worker saves the state of its heads; any number of workers can resume from them.
"""

import json
import re
import time
from typing import Any

import torch

from icce_ray.methods.saved_state import SavedState, read_state, save_state
from icce_ray.store import Folder
from icce_ray.store.part_records import PartRecords

NAME = re.compile(r"(epoch-(\d+)-heads-(\d+)-(\d+))\.safetensors")
FOLDER_NAME = "checkpoints"


class CheckpointFolder:
    """The checkpoints of a run, beside the artifact that it will write."""

    def __init__(self, folder: Folder) -> None:
        self.records = PartRecords(folder / FOLDER_NAME, "heads")
        self._epochs: list[int] = []

    def save(self, tensors: dict[str, torch.Tensor], values: dict[str, Any], heads: range) -> None:
        """Write the state of `heads` after ``values["epoch"]`` epochs. The worker of head 0 removes the checkpoints of
        all workers but the last two, which are complete: workers save at the same epochs, and wait for each other in
        between."""
        name = f"epoch-{values['epoch']:06d}-heads-{heads.start:05d}-{heads.stop:05d}"
        save_state(self.records, name, tensors, values)
        self._epochs.append(values["epoch"])
        if heads.start == 0 and len(self._epochs) > 1:
            for epoch, _, name in self._files():
                if epoch < self._epochs[-2]:
                    self.records.remove(name)
                    self.records.folder.remove(f"{name}.safetensors")

    def load(self, heads: range, max_epoch: int | None = None) -> SavedState | None:
        """The newest state of `heads`, up to `max_epoch`, all of whose files are whole; None if there is none."""
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
        self.records.folder.clear()

    def _read(self, heads: range, files: list[tuple[range, str]]) -> SavedState | None:
        """Join the state of `heads` from files, each of which has some of them."""
        joined: list[dict[str, torch.Tensor]] = []
        values: dict[str, Any] = {}
        head = heads.start
        while head < heads.stop:
            found = next(((saved, name) for saved, name in files if head in saved), None)
            if found is None:
                return None
            saved, name = found
            state = read_state(self.records, name)
            if state is None:
                return None
            tensors, values = state
            stop = min(heads.stop, saved.stop)
            rows = slice(head - saved.start, stop - saved.start)
            joined.append({key: tensor[rows] for key, tensor in tensors.items()})
            head = stop
        return {name: torch.cat([part[name] for part in joined]) for name in joined[0]}, values

    def _files(self) -> list[tuple[int, range, str]]:
        """Epoch, heads and name of every checkpoint."""
        matches = [match for name in self.records.folder.names() if (match := NAME.fullmatch(name))]
        return [(int(match[2]), range(int(match[3]), int(match[4])), match[1]) for match in matches]


FILE_NAME = "metrics.jsonl"
WRITE_INTERVAL_S = 10.0


class MetricsLog:
    """Writes the history as it grows, at most every ten seconds. Object stores cannot append, so it writes all of it
    each time."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._last_write = 0.0

    def update(self, history: list[dict[str, Any]], finished: bool = False) -> None:
        now = time.monotonic()
        if finished or now - self._last_write >= WRITE_INTERVAL_S:
            self._last_write = now
            self.folder.write_bytes(FILE_NAME, "".join(json.dumps(epoch) + "\n" for epoch in history).encode())
