"""Show in a stage's progress that it waits for a store that does not answer."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from icce_ray.config import StorageConfig
from icce_ray.runtime.progress import Progress, format_seconds
from icce_ray.runtime.threads import repeating
from icce_ray.store import s3
from icce_ray.store.filesystem import open_uri, store_of

POLL_S = 10.0


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
