"""Live training metrics in the artifact's folder: ``metrics.jsonl``, one JSON object per epoch, and TensorBoard event
files if TensorBoard is installed and the folder is local."""

from __future__ import annotations

import importlib.util
import json
import time
from typing import Any

from icce_ray.store import Folder

FILE_NAME = "metrics.jsonl"
WRITE_INTERVAL_S = 10.0
SCALARS = (
    "loss", "best_head_loss", "learning_rate", "ce_weight", "empty_clusters", "balance", "label_change", "head_nmi",
    "size_agreement",
)  # fmt: skip


class MetricsLog:
    """Writes the history as it grows, at most every ten seconds. Object stores cannot append, so it writes all of it
    each time."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._last_write = 0.0
        self._num_in_board = 0
        self._board: Any = None

    def update(self, history: list[dict[str, Any]], finished: bool = False) -> None:
        now = time.monotonic()
        if not finished and now - self._last_write < WRITE_INTERVAL_S:
            return
        self._last_write = now
        self.folder.write_bytes(FILE_NAME, "".join(json.dumps(epoch) + "\n" for epoch in history).encode())
        self._update_board(history)
        if finished and self._board is not None:
            self._board.close()

    def _update_board(self, history: list[dict[str, Any]]) -> None:
        path = self.folder.local_path
        if path is None or importlib.util.find_spec("tensorboard") is None:
            return
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

            self._board = SummaryWriter(str(path / "tensorboard"))  # type: ignore[no-untyped-call]
        for epoch in history[self._num_in_board :]:
            for name in SCALARS:
                if epoch[name] is not None:
                    self._board.add_scalar(f"heads/{name}", epoch[name], epoch["epoch"])
        self._num_in_board = len(history)
        self._board.flush()
