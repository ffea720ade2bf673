"""Progress of a stage on standard error: a line that rewrites itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

PLAIN_INTERVAL_S = 5.0
TERMINAL_INTERVAL_S = 0.2


class Progress:
    """Says how far one stage is: done of total, rate, time left.

    Args:
        stage: name shown in front.
        unit: what is counted, in the plural.
        quiet: say nothing.
    """

    def __init__(self, stage: str, unit: str = "images", quiet: bool = False) -> None:
        self.stage = stage
        self.unit = unit
        self.quiet = quiet
        self._started = time.monotonic()
        self._first_done: int | None = None
        self._last_shown = self._started
        self._on_terminal = sys.stderr.isatty()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Report `done` of `total`; shown at most every few seconds. The rate leaves out what a resumed run had."""
        now = time.monotonic()
        if self._first_done is None:
            self._first_done, self._started = done, now
        interval = TERMINAL_INTERVAL_S if self._on_terminal else PLAIN_INTERVAL_S
        if self.quiet or now - self._last_shown < interval:
            return
        self._last_shown = now
        rate = (done - self._first_done) / max(now - self._started, 1e-9)
        text = f"{self.stage}: {done:,}/{total:,} {self.unit}"
        if rate > 0:
            text += f", {rate:,.3g}/s, {format_seconds((total - done) / rate)} left"
        self._print(text + (f", {note}" if note else ""))

    def note(self, text: str) -> None:
        """One lasting line: something worth knowing, or the end of the stage."""
        if self.quiet:
            return
        self._print(f"{self.stage}: {text}")
        if self._on_terminal:
            print(file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        if self._on_terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


class ProgressBoard:
    """A place on the cluster where workers say how far they are. Not beside the trainer: its process would have to
    import all that the trainer does."""

    def __init__(self) -> None:
        self.latest: tuple[int, int, str] | None = None

    def post(self, done: int, total: int, note: str) -> None:
        self.latest = (done, total, note)

    def read(self) -> tuple[int, int, str] | None:
        return self.latest


class BoardProgress(Progress):
    """Progress that goes to the board instead of the worker's own terminal."""

    def __init__(self, board: Any) -> None:
        super().__init__("heads", quiet=True)
        self.board = board

    def update(self, done: int, total: int, note: str = "") -> None:
        self.board.post.remote(done, total, note)


def format_seconds(seconds: float) -> str:
    """``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
