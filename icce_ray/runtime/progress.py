"""Progress of a stage on standard error: a line that rewrites itself on a terminal, plain lines elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from icce_ray.config import StorageConfig
from icce_ray.runtime.threads import repeating
from icce_ray.store import s3
from icce_ray.store.filesystem import open_uri, store_of

PLAIN_INTERVAL_S = 5.0
TERMINAL_INTERVAL_S = 0.2
LONG_S = 2 * 3600.0
"""A stage with more than this left says what would make it shorter."""
MEASURED_S = 30.0
"""Time after which the rate is trusted for that."""
POLL_S = 10.0
"""How often stores are asked whether they answer."""
RECENT_S = 60.0
"""The rate is that of the last minute, so that it soon reflects a slow start or an added machine."""


@dataclass(frozen=True)
class Reading:
    """How far a stage is at one moment."""

    stage: str
    unit: str
    """What is counted, in the plural."""
    done: int | None
    """None until something was counted."""
    total: int | None
    """None while it is not known."""
    rate: float | None
    """Units per second, lately; None if nothing was done."""
    num_errors: int
    note: str

    @property
    def seconds_left(self) -> float | None:
        if self.rate is None or self.total is None or self.done is None:
            return None
        return (self.total - self.done) / self.rate

    def text(self) -> str:
        """``12,000/50,000 images, 350/s, 1 min 49 s left, 3 errors``."""
        if self.done is None:
            return ", ".join(filter(None, ["nothing counted yet", self.note]))
        said = [f"{self.done:,}{'' if self.total is None else f'/{self.total:,}'} {self.unit}"]
        if self.rate is not None:
            said.append(f"{self.rate:,.3g}/s")
        if self.seconds_left is not None:
            said.append(f"{format_seconds(self.seconds_left)} left")
        if self.num_errors:
            said.append(f"{self.num_errors:,} error{'s' * (self.num_errors > 1)}")
        return ", ".join([*said, *filter(None, [self.note])])


class Progress:
    """Says how far one stage is: done of total, rate, time left; and once, if more than LONG_S is left, the `shortcut`:
    what to set to be done sooner."""

    def __init__(
        self,
        stage: str,
        unit: str = "images",
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
        shortcut: str = "",
    ) -> None:
        self.stage, self.unit, self.quiet = stage, unit, quiet
        self._clock, self._shortcut = clock, shortcut
        self._recent: deque[tuple[float, int]] = deque()
        self._total: int | None = None
        self._num_errors, self._note, self._waiting = 0, "", ""
        self._last_shown = self._began = clock()
        self._on_terminal = sys.stderr.isatty()

    def update(self, done: int, total: int | None, note: str = "", num_errors: int = 0) -> None:
        """Report `done` of `total`; shown at most every few seconds. The rate excludes what a resumed run had."""
        now = self._clock()
        self._recent.append((now, done))
        # The last one that is older than a minute stays: the rate is measured from there.
        while len(self._recent) > 2 and self._recent[1][0] <= now - RECENT_S:
            self._recent.popleft()
        self._total, self._note, self._num_errors = total, note, num_errors
        if self._shortcut and now - self._began >= MEASURED_S and (left_s := self.read().seconds_left or 0) > LONG_S:
            self.note(f"this will take about {format_seconds(left_s)} here. Shorter: {self._shortcut}")
            self._shortcut = ""
        interval = TERMINAL_INTERVAL_S if self._on_terminal else PLAIN_INTERVAL_S
        if now - self._last_shown >= interval:
            self._last_shown = now
            self._print(self.read().text())

    def read(self) -> Reading:
        """How far it is now. Another thread may call it."""
        recent = list(self._recent)
        note = ", ".join(filter(None, [self._note, self._waiting]))
        if not recent:
            return Reading(self.stage, self.unit, None, None, None, 0, note)
        (then, before), (_, done) = recent[0], recent[-1]
        rate = (done - before) / max(self._clock() - then, 1e-9)
        return Reading(self.stage, self.unit, done, self._total, rate if rate > 0 else None, self._num_errors, note)

    def waits(self, text: str) -> None:
        """Say at once what the stage waits for; "" if for nothing any more."""
        self._waiting = text
        if text:
            self._print(self.read().text())

    def note(self, text: str) -> None:
        """Print a lasting line."""
        self._print(text, "\n" if self._on_terminal else "")

    def _print(self, text: str, end: str = "") -> None:
        if not self.quiet:
            line = f"{self.stage}: {text}"
            print(f"\r\x1b[K{line}{end}" if self._on_terminal else f"{line}\n", end="", file=sys.stderr, flush=True)


QUIET = Progress("", quiet=True)
"""For functions that nobody watches."""


class ProgressBoard:
    """Holds the latest progress of a worker for others to read. For several workers it is an actor of its own, which
    need not import what they do."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.latest: tuple[int, int | None, str] | None = None

    def __repr__(self) -> str:
        return f"{self.stage}: progress"

    def post(self, done: int, total: int | None, note: str) -> None:
        self.latest = (done, total, note)

    def read(self) -> tuple[int, int | None, str] | None:
        return self.latest


class BoardProgress(Progress):
    """Progress that goes to a board, by its method `post` or a remote call of that."""

    def __init__(self, stage: str, post: Callable[[int, int | None, str], object]) -> None:
        super().__init__(stage, quiet=True)
        self._post = post

    def update(self, done: int, total: int | None, note: str = "", num_errors: int = 0) -> None:
        self._post(done, total, note)


def format_bytes(num_bytes: float, digits: int = 3) -> str:
    """``1.23 GB``: decimal units, `digits` significant digits, but never fewer than stand before the point."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.{digits}g} {unit}" if num_bytes < 100 else f"{num_bytes:.0f} {unit}"


def format_seconds(seconds: float) -> str:
    """``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def outages_told(uris: Iterable[str], options: StorageConfig, progress: Progress) -> Iterator[None]:
    """While the block runs, ask the stores of `uris` whether they answer, and tell `progress` of those that don't."""
    stores = {store: uri for uri in uris if (store := store_of(uri)) is not None}
    since: dict[str, float] = {}

    def answers(store: str) -> bool:
        return bool(s3.answers(store, options) if s3.is_s3(store) else open_uri(stores[store])[0].handler.answers())

    def look() -> None:
        nonlocal since
        now = time.monotonic()
        since = {store: since.get(store, now) for store in stores if not answers(store)}
        progress.waits(
            ", ".join(
                f"waits for {store}, which has not answered for {format_seconds(now - began)} (stops after "
                f"{format_seconds(s3.OUTAGE_S)})"
                for store, began in since.items()
                if began < now  # a slow answer is no outage: it has to miss twice
            )
        )

    if not stores:
        yield
        return
    with repeating(look, POLL_S, "icce_ray-storage"):
        yield
