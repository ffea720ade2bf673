"""Progress of the ``embed`` stage: finished parts, images that failed and why, and images with the same content."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from icce_ray.embed.content_index import Duplicates
from icce_ray.embed.embedding_parts import ERRORS_NAME, Error, FinishedPart, PartRange, read_finished
from icce_ray.errors import InputError
from icce_ray.images.listing import REMOVED, Listing
from icce_ray.stage import StageContext
from icce_ray.store.part_records import PartRecords

DUPLICATES_NAME = "duplicates.parquet"
ERRORS_SCHEMA = pa.schema([("image_id", pa.int64()), ("uri", pa.string()), ("reason", pa.string())])
DUPLICATES_SCHEMA = pa.schema(
    [("image_id", pa.int64()), ("uri", pa.string()), ("duplicate_of", pa.int64()), ("content_hash", pa.string())]
)
REASONS_SHOWN = 5
READ_THREADS = 8


class Tally:
    """Adds up finished parts, in any order.

    Args:
        context: the stage's; parts are added to its writer, progress is reported to it.
        listing: of all images.
        max_error_rate: share of the images that may fail.
    """

    def __init__(self, context: StageContext, listing: Listing, max_error_rate: float) -> None:
        self._context = context
        self._listing = listing
        self._max_error_rate = max_error_rate
        self._errors: list[Error] = []
        self._num_removed = 0
        self._duplicates = Duplicates()
        self._num_done = 0
        self._num_resumed = 0
        self._num_embedded = self._num_stretched = 0
        self._kinds: set[tuple[int, str]] = set()
        self._started = time.monotonic()
        self._finished: set[str] = set()
        self._unfinished: dict[str, int] = {}
        self._shown = 0
        self._showing = threading.Lock()

    def resume(self, parts: Sequence[PartRange], records: PartRecords) -> list[PartRange]:
        """Take in the parts that an earlier run finished. Returns those that are left to do."""
        found = records.read_all(check_files=False)  # `read_finished` reads them
        recorded = [found[part.name] for part in parts if part.name in found]
        with ThreadPoolExecutor(READ_THREADS) as threads:
            finished = list(threads.map(lambda record: read_finished(records.folder, record), recorded))
        intact = [part for part in finished if part is not None]
        for part in intact:
            self.add_earlier(part)
        names = {part.record.name for part in intact}
        return [part for part in parts if part.name not in names]

    def add_earlier(self, part: FinishedPart) -> None:
        """Take in a part that an earlier run made."""
        self._num_resumed += part.record.metrics["num_images"]
        self.add(part)
        self._started = time.monotonic()

    def add(self, part: FinishedPart) -> None:
        """Take in a finished part.

        Raises:
            InputError: more images have failed by now than `max_error_rate` of all.
        """
        (file,), metrics = part.record.files, part.record.metrics
        assert file.shape is not None
        assert file.dtype is not None
        self._context.output.add(file)
        self._kinds.add((file.shape[1], file.dtype))
        errors = [(int(image_id), str(reason)) for image_id, reason in metrics["errors"]]
        self._errors += errors
        self._num_removed += sum(reason == REMOVED for _, reason in errors)
        self._num_done += metrics["num_images"]
        self._num_embedded += metrics["num_embedded"]
        self._num_stretched += metrics.get("num_stretched", 0)
        self._duplicates.add(part.image_ids, part.hashes)
        num_listed = len(self._listing)
        self._finished.add(part.record.name)
        self._show()
        if len(self._errors) - self._num_removed > self._max_error_rate * num_listed:
            raise InputError(
                f"{len(self._errors):,} of {num_listed:,} images cannot be used so far, more than "
                f"embed.max_error_rate ({self._max_error_rate:g}) allows: {self._reasons_with_examples()}. "
                "Repair or remove them, or raise embed.max_error_rate; finished parts are kept"
            )

    def add_batch(self, part: PartRange, num_embedded: int) -> None:
        """Show how many images of an unfinished part are embedded. May be called by another thread, and too late."""
        self._show({part.name: num_embedded})

    def _show(self, batches: Mapping[str, int] | None = None) -> None:
        with self._showing:
            self._unfinished = {
                name: number
                for name, number in {**self._unfinished, **(batches or {})}.items()
                if name not in self._finished
            }
            # Never backwards: a worker that died, or a part that is reported late, would give a negative rate.
            self._shown = max(self._shown, self._num_done + sum(self._unfinished.values()))
            self._context.progress.update(self._shown, len(self._listing), num_errors=len(self._errors))

    def finish(self, feature_set: str) -> dict[str, Any]:
        """Write the tables of errors and duplicates.

        Returns:
            Metrics: num_images (good ones), num_errors, errors (count by reason), num_duplicates (images with the same
            bytes as an earlier one), num_embedded (contents that went through the backbone in this run), num_stretched
            (grey images of more than 8 bits, whose range is a guess), dim, dtype, feature_set, images_per_s (None if
            nothing was left to do).
        """
        assert self._num_done == len(self._listing), "each image is in one part"
        ((dim, dtype),) = self._kinds
        uri = self._listing.uri
        errors = [(image_id, uri(image_id), reason) for image_id, reason in sorted(self._errors)]
        duplicates = [(image_id, uri(image_id), first, value) for image_id, first, value in self._duplicates.found()]
        self._write_rows(ERRORS_NAME, ERRORS_SCHEMA, errors)
        self._write_rows(DUPLICATES_NAME, DUPLICATES_SCHEMA, duplicates)
        if self._num_stretched:
            self._context.progress.note(
                f"{self._num_stretched:,} grey images of more than 8 bits: each is stretched from minimum to maximum"
            )
        seconds, num_new = time.monotonic() - self._started, self._num_done - self._num_resumed
        return {
            "num_images": self._num_done - len(self._errors),
            "num_errors": len(self._errors),
            "errors": dict(self._reasons().most_common()),
            "num_duplicates": len(duplicates),
            "num_embedded": self._num_embedded,
            "num_stretched": self._num_stretched,
            "dim": dim,
            "dtype": dtype,
            "feature_set": feature_set,
            "images_per_s": round(num_new / max(seconds, 1e-9), 1) if num_new else None,
        }

    def _write_rows(self, name: str, schema: pa.Schema, rows: list[tuple[Any, ...]]) -> None:
        columns = list(zip(*rows, strict=True)) or [()] * len(schema)
        arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
        self._context.output.write_table(name, pa.table(arrays, schema=schema))

    def _reasons(self) -> Counter[str]:
        return Counter(reason for _, reason in sorted(self._errors))

    def _reasons_with_examples(self) -> str:
        examples: dict[str, int] = {}
        for image_id, reason in sorted(self._errors):
            examples.setdefault(reason, image_id)
        common = self._reasons().most_common()
        shown = [
            f"{count:,} x {reason} (such as {self._listing.uri(examples[reason])})"
            for reason, count in common[:REASONS_SHOWN]
        ]
        return ", ".join(shown) + (", ..." if len(common) > REASONS_SHOWN else "")
