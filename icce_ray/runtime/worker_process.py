"""The work of one worker process, whoever started it: an actor or Ray Train."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from icce_ray.errors import UserError, WorkerError
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.threads import repeating

MAX_RESTARTS = 3
POLL_INTERVAL_S = 1.0
BUSY_SHARE_OVER_S = 10.0
"""Time over which the share that the backbone is at work is measured."""

Work = Callable[..., Any]
"""Called with `num_threads`, `device` ("cpu" or "cuda", possibly numbered) and `progress`. Everything else is bound to
it. A module-level function, so that a worker can import it. Several workers find each other by torch.distributed."""


def attempt(work: Work, device: str, progress: Progress) -> Any:
    """The result of the work, or an error that would only occur again: raised, it would be retried."""
    try:
        return work(device=device, progress=progress)
    except (UserError, WorkerError) as error:
        return error


@contextmanager
def relayed_progress(ask: Callable[[], Any], progress: Progress) -> Iterator[None]:
    """While the block runs, pass on what a worker last reported: `ask` returns a reference to it."""
    import ray

    def relay() -> None:
        try:
            latest = ray.get(ask(), timeout=POLL_INTERVAL_S)
        except ray.exceptions.RayError:
            return
        if latest is not None:
            progress.update(*latest)

    with repeating(relay, POLL_INTERVAL_S, f"{progress.stage}-progress"):
        yield


class EmbedMetrics:
    """Metrics of an embedding actor. Ray passes them on to Prometheus (docs/ray-cluster.md)."""

    def __init__(self) -> None:
        import ray
        from ray.util.metrics import Counter, Gauge

        self._counters = [
            Counter("icce_ray_embed_images", "Images of finished parts"),
            Counter("icce_ray_embed_errors", "Images that could not be used"),
            Counter("icce_ray_embed_read_bytes", "Size of the image files that were read"),
        ]
        self._busy_share = Gauge("icce_ray_embed_busy_share", "Share of the time with the backbone at work", ("actor",))
        self._busy_share.set_default_tags({"actor": ray.get_runtime_context().get_actor_id() or ""})
        self._lock = threading.Lock()
        self._since, self._busy_s = time.monotonic(), 0.0

    def add(self, num_images: int, num_errors: int, num_bytes: int, busy_s: float) -> None:
        """Count a finished part; `busy_s`: for how long the backbone has been at work so far."""
        for counter, number in zip(self._counters, (num_images, num_errors, num_bytes), strict=True):
            if number:  # Ray refuses to add nothing
                counter.inc(number)
        with self._lock:
            seconds = time.monotonic() - self._since
            if seconds >= BUSY_SHARE_OVER_S:
                self._busy_share.set((busy_s - self._busy_s) / seconds)
                self._since, self._busy_s = time.monotonic(), busy_s
