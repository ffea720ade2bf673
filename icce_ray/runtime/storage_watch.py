"""Show in a stage's progress that it waits for a bucket that does not answer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from icce_ray.config import StorageConfig
from icce_ray.runtime.progress import Progress, format_seconds
from icce_ray.runtime.threads import repeating
from icce_ray.store import s3

POLL_S = 10.0


@contextmanager
def outages_told(uris: Iterable[str], options: StorageConfig, progress: Progress) -> Iterator[None]:
    """While the block runs, ask the buckets of `uris` whether they answer, and tell `progress` of those that don't."""
    buckets = sorted({f"s3://{s3.split_uri(uri)[0]}" for uri in uris if s3.is_s3(uri)})
    since: dict[str, float] = {}

    def look() -> None:
        nonlocal since
        now = time.monotonic()
        since = {bucket: since.get(bucket, now) for bucket in buckets if not s3.answers(bucket, options)}
        progress.waits(
            ", ".join(
                f"waits for {bucket}, which has not answered for {format_seconds(now - began)} (stops after "
                f"{format_seconds(s3.OUTAGE_S)})"
                for bucket, began in since.items()
            )
        )

    if not buckets:
        yield
        return
    with repeating(look, POLL_S, "icce_ray-storage"):
        yield
