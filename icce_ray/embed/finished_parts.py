"""What the ``embed`` stage has so far: finished parts, images that failed and why, and when that is too many; and which
images are copies of each other."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.embed.content_index import Duplicates
from icce_ray.embed.embedding_parts import (
    Error,
    PartRange,
    PartRecord,
    errors_table,
    part_table,
    read_record,
    write_part,
)
from icce_ray.errors import InputError
from icce_ray.images.embedding_files import Embeddings
from icce_ray.images.listing import REMOVED, Listing
from icce_ray.stage import StageContext

ERRORS_NAME = "errors.parquet"
DUPLICATES_NAME = "duplicates.parquet"
DUPLICATES_SCHEMA = pa.schema(
    [("image_id", pa.int64()), ("uri", pa.string()), ("duplicate_of", pa.int64()), ("content_hash", pa.string())]
)
REASONS_SHOWN = 5
READ_THREADS = 8
"""Of what an earlier run finished, which is read back from storage."""


class Tally:
    """Takes in finished parts, in any order.

    Args:
        context: the stage's; parts are added to its writer, progress is reported to it.
        listing: of all images.
        max_error_rate: share of the images that may fail.
    """

    def __init__(self, context: StageContext, listing: Listing, max_error_rate: float) -> None:
        self._context = context
        self._listing = listing
        self._num_listed = len(listing)
        self._max_errors = max_error_rate * self._num_listed
        self._max_error_rate = max_error_rate
        self._errors: list[Error] = []
        self._num_removed = 0
        self._duplicates = Duplicates()
        self._done = 0
        self._resumed = 0
        self._num_embedded = 0
        self._dims: set[int] = set()
        self._dtypes: set[str] = set()
        self._started = time.monotonic()

    def resume(self, parts: list[PartRange]) -> list[PartRange]:
        """Take in what an earlier run finished; the parts that are left to do."""
        folder = self._context.output.folder
        names = set(folder.names())
        there = [part for part in parts if part.name in names]
        missing = {part.name for part in parts} - names
        with ThreadPoolExecutor(READ_THREADS) as threads:
            for part, record in zip(there, threads.map(partial(read_record, folder), there), strict=True):
                if record is None:
                    missing.add(part.name)
                else:
                    self.add_finished(record)
        pending = [part for part in parts if part.name in missing]
        self._started = time.monotonic()
        return pending

    def add_finished(self, record: PartRecord) -> None:
        """Take in a part that was not made now."""
        self._resumed += record.num_images
        self.add(record)

    def add(self, record: PartRecord) -> None:
        """Take in a finished part.

        Raises:
            InputError: more images have failed by now than `max_error_rate` of all.
        """
        assert record.part.shape is not None
        assert record.part.dtype is not None
        self._context.output.add(record.part)
        self._errors += record.errors
        self._num_removed += sum(reason == REMOVED for _, reason in record.errors)
        self._duplicates.add(record.image_ids, record.hashes)
        self._done += record.num_images
        self._num_embedded += record.num_embedded
        self._dims.add(record.part.shape[1])
        self._dtypes.add(record.part.dtype)
        self._context.progress.update(self._done, self._num_listed, num_errors=len(self._errors))
        if len(self._errors) - self._num_removed > self._max_errors:
            raise InputError(
                f"{len(self._errors):,} of {self._num_listed:,} images cannot be used so far, more than "
                f"embed.max_error_rate ({self._max_error_rate:g}) allows: {self._reasons_with_examples()}. "
                "Mend or remove them, or raise embed.max_error_rate; what is finished stays"
            )

    def finish(self, feature_set: str, num_clusters: int, setting: str = "num_clusters") -> dict[str, Any]:
        """Write the tables of errors and duplicates. `setting` is where `num_clusters` comes from.

        Returns:
            Metrics: num_images (good ones), num_errors, errors (count by reason), num_duplicates (images whose bytes an
            image before them has), num_embedded (contents that went through the backbone in this run), dim, dtype,
            feature_set, images_per_s (None where nothing was left to do).

        Raises:
            InputError: fewer good images than `num_clusters`.
        """
        assert self._done == self._num_listed, "each image is in one part"
        assert len(self._dims) == 1, "parts of one artifact have one width"
        num_good = self._done - len(self._errors)
        if num_good < num_clusters:
            failed = f": {self._reasons_with_examples()}" if self._errors else ""
            raise InputError(
                f"{setting}: {num_clusters} clusters asked for, but only {num_good} of {self._done} images "
                f"can be used{failed}"
            )
        self._context.output.write_table(ERRORS_NAME, errors_table(self._errors, self._listing.uri))
        num_duplicates = self._write_duplicates()
        seconds, embedded = time.monotonic() - self._started, self._done - self._resumed
        return {
            "num_images": num_good,
            "num_errors": len(self._errors),
            "errors": dict(self._reasons().most_common()),
            "num_duplicates": num_duplicates,
            "num_embedded": self._num_embedded,
            "dim": self._dims.pop(),
            "dtype": self._dtypes.pop(),
            "feature_set": feature_set,
            "images_per_s": round(embedded / max(seconds, 1e-9), 1) if embedded else None,
        }

    def _write_duplicates(self) -> int:
        found = [
            (image_id, self._listing.uri(image_id), first, value) for image_id, first, value in self._duplicates.found()
        ]
        columns = [list(column) for column in zip(*found, strict=True)] or [[] for _ in DUPLICATES_SCHEMA]
        arrays = [pa.array(column, kind) for column, kind in zip(columns, DUPLICATES_SCHEMA.types, strict=True)]
        self._context.output.write_table(DUPLICATES_NAME, pa.table(arrays, schema=DUPLICATES_SCHEMA))
        return len(found)

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


def convert_ready_made(embeddings: Embeddings, pending: list[PartRange], tally: Tally, context: StageContext) -> None:
    """Write the `pending` parts of ready-made embeddings, reading the source once, in order, from the first of them on.

    Raises:
        InputError: as :meth:`Embeddings.blocks`.
    """
    if not pending:
        return
    left = {part.start: part for part in pending}
    first = pending[0]
    position = first.start
    for block in embeddings.blocks(first.stop - first.start, start=first.start):
        part = left.get(position)
        if part is not None:
            assert len(block) == part.stop - part.start
            ids = np.arange(part.start, part.stop, dtype=np.int64)
            tally.add(write_part(context.output.folder, part, part_table(part, ids, block)))
        position += len(block)
