"""Live training metrics in the artifact's folder: ``metrics.jsonl``, one JSON object per epoch."""

from __future__ import annotations

import json
import time
from typing import Any

from icce_ray.store import Folder

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
