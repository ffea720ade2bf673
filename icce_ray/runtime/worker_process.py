"""The work of one worker process, whoever started it: an actor or Ray Train."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from icce_ray.errors import UserError, WorkerError
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.threads import repeating

MAX_RESTARTS = 3
POLL_INTERVAL_S = 1.0

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
