"""Progress of the ``embed`` stage: finished parts, images that failed and why, and images with the same content."""

import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.embed.duplicates import HashedPart, Ids, find_duplicates
from icce_ray.embed.embedding_parts import ERRORS_NAME, ITEM, PartRange, plan_parts, read_hashes
from icce_ray.embed.feature_matrix import PART_PREFIX
from icce_ray.embed.part_hashes import write_hashes
from icce_ray.errors import DamagedArtifactError, InputError
from icce_ray.images.listing import REMOVED, Listing
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, Part
from icce_ray.store.artifact import folder_of
from icce_ray.store.claim import check_claim
from icce_ray.store.part_records import READ_THREADS, PartRecord, PartRecords

DUPLICATES_NAME = "duplicates.parquet"
ERRORS_SCHEMA = pa.schema([("image_id", pa.int64()), ("uri", pa.string()), ("reason", pa.string())])
DUPLICATES_SCHEMA = pa.schema(
    [("image_id", pa.int64()), ("uri", pa.string()), ("duplicate_of", pa.int64()), ("content_hash", pa.string())]
)
REASONS_SHOWN = 5
IDS_TOGETHER = 65_536
"""The tables are written in pieces of this range of ids."""
REUSE_THREADS = 8
SAME = ["uri", "size_bytes", "etag", "problem"]
"""Columns of the listing: images that agree in them are the same file."""


class Tally:
    """Adds up finished parts, in any order. `max_error_rate` is the share of the images that may fail."""

    def __init__(self, context: StageContext, listing: Listing, max_error_rate: float) -> None:
        self._context, self._listing, self._max_error_rate = context, listing, max_error_rate
        self._failed_ids, self._reasons = array("q"), array("i")  # 12 bytes for each error
        self._reason_numbers: dict[str, int] = {}
        self._counts = Counter[str]()
        self._examples: dict[str, int] = {}
        self._files: list[tuple[int, int, Part]] = []
        self._num_done = self._num_resumed = self._num_embedded = self._num_stretched = 0
        self._kinds: set[tuple[int, str]] = set()
        self._started, self._shown, self._showing = time.monotonic(), 0, threading.Lock()

    def resume(self, parts: Sequence[PartRange], records: PartRecords) -> tuple[list[PartRange], dict[str, PartRecord]]:
        """Take in the parts that an earlier run finished. The parts themselves are not read: damage is noticed by the
        stage that reads them. Work items are: a damaged one is done again. Returns the parts that are left to do, and
        the records of finished work items, by name."""
        found = records.read_all(check_files=False)
        finished = [found.pop(part.name) for part in parts if part.name in found]
        for record in finished:
            self.add_earlier(record)
        names = {record.name for record in finished}
        with ThreadPoolExecutor(READ_THREADS) as threads:
            items = threads.map(records.read, [name for name in found if name.startswith(ITEM)])
            done = {record.name: record for record in items if record is not None}
        return [part for part in parts if part.name not in names], done

    def add_earlier(self, record: PartRecord) -> None:
        """Take in a part, or a work item, that an earlier run made."""
        self._num_resumed += record.metrics["num_images"]
        self._count(record)
        self._add_file(record)
        self._started = time.monotonic()

    def add_untouched(self, num_images: int) -> None:
        """Take in images of amended parts that lie in no work item."""
        self._num_done += num_images
        self._num_resumed += num_images

    def add(self, record: PartRecord) -> None:
        """Take in a finished part, or a work item of one: images count when their item is finished. Raises InputError:
        more images have failed by now than `max_error_rate` of all."""
        if not record.metrics.get("joined"):
            self._count(record)
        self._add_file(record)

    def _add_file(self, record: PartRecord) -> None:
        (file,), metrics = record.files, record.metrics
        if file.name.startswith(ITEM):
            return
        assert file.shape is not None
        assert file.dtype is not None
        self._context.output.add(file)
        self._files.append((metrics["start"], metrics["start"] + metrics["num_images"], file))
        self._kinds.add((file.shape[1], file.dtype))

    def _count(self, record: PartRecord) -> None:
        metrics = record.metrics
        for image_id, reason in metrics["errors"]:
            self._failed_ids.append(image_id)
            self._reasons.append(self._reason_numbers.setdefault(reason, len(self._reason_numbers)))
            self._examples[reason] = min(image_id, self._examples.get(reason, image_id))
        self._counts.update(reason for _, reason in metrics["errors"])
        self._num_done += metrics["num_images"]
        self._num_embedded += metrics["num_embedded"]
        self._num_stretched += metrics.get("num_stretched", 0)
        num_errors, num_listed = len(self._failed_ids), len(self._listing)
        self.show(0)
        if num_errors - self._counts[REMOVED] > self._max_error_rate * num_listed:
            raise too_many_errors(
                num_errors, num_listed, self._max_error_rate, self._most_common(),
                lambda reason: self._listing.uri(self._examples[reason]),
            )  # fmt: skip

    def show(self, num_unfinished: int) -> None:
        """Show that so many images of unfinished parts are embedded. May be called by another thread, and too late."""
        with self._showing:
            # Never backwards: a worker that died, or a part that is reported late, would give a negative rate.
            self._shown = max(self._shown, min(self._num_done + num_unfinished, len(self._listing)))
            self._context.progress.update(self._shown, len(self._listing), num_errors=len(self._failed_ids))

    def finish(self, feature_set: str, *, has_hashes: bool = True) -> dict[str, Any]:
        """Write the tables of errors and duplicates; of the latter only if there are image files, which have hashes.

        Returns metrics: num_images (good ones), num_errors, errors (count by reason), num_duplicates (images with the
        same bytes as an earlier one), num_embedded (contents that went through the backbone in this run), num_stretched
        (grey images of more than 8 bits, whose range is a guess), dim, dtype, feature_set (name of the first),
        images_per_s (None if nothing was left to do). Raises DamagedArtifactError: as :func:`find_duplicates`."""
        assert self._num_done == len(self._listing), "each image is in one part"
        ((dim, dtype),) = self._kinds
        failed_ids = np.array(self._failed_ids, np.int64)
        order = np.argsort(failed_ids)
        failed_ids, reasons = failed_ids[order], np.array(self._reasons, np.int32)[order]
        parts = list(self._hashed_parts(failed_ids)) if has_hashes else []
        write = self._context.output.write_tables
        duplicates = write(DUPLICATES_NAME, DUPLICATES_SCHEMA, self._duplicates(parts))
        write(ERRORS_NAME, ERRORS_SCHEMA, self._errors(failed_ids, reasons))
        if self._num_stretched:
            self._context.progress.note(
                f"{self._num_stretched:,} grey images of more than 8 bits: each is stretched from minimum to maximum"
            )
        seconds, num_new = time.monotonic() - self._started, self._num_done - self._num_resumed
        return {
            "num_images": self._num_done - len(failed_ids),
            "num_errors": len(failed_ids),
            "errors": dict(self._most_common()),
            "num_duplicates": duplicates.rows,
            "num_embedded": self._num_embedded,
            "num_stretched": self._num_stretched,
            "dim": dim,
            "dtype": dtype,
            "feature_set": feature_set,
            "images_per_s": round(num_new / max(seconds, 1e-9), 1) if num_new else None,
        }

    def _hashed_parts(self, failed_ids: Ids) -> Iterator[HashedPart]:
        own = self._context.output.folder
        for start, stop, file in sorted(self._files, key=lambda place: place[0]):
            first, last = np.searchsorted(failed_ids, [start, stop])
            yield HashedPart(folder_of(own, file), file.name, start, stop, failed_ids[first:last])

    def _errors(self, failed_ids: Ids, reasons: npt.NDArray[np.int32]) -> Iterator[pa.Table]:
        names = pa.array(list(self._reason_numbers), pa.string())
        for place in _pieces(failed_ids):
            ids = failed_ids[place]
            yield pa.table([ids, self._uris(ids), names.take(pa.array(reasons[place]))], schema=ERRORS_SCHEMA)

    def _duplicates(self, parts: Sequence[HashedPart]) -> Iterator[pa.Table]:
        for found in find_duplicates(parts):
            for place in _pieces(found.image_ids):
                ids, hashes = found.image_ids[place], [row.tobytes().hex() for row in found.hashes_nB[place]]
                yield pa.table([ids, self._uris(ids), found.first_ids[place], hashes], schema=DUPLICATES_SCHEMA)

    def _uris(self, image_ids: Ids) -> pa.ChunkedArray:
        first, last = int(image_ids[0]), int(image_ids[-1])
        return self._listing.table(first, last + 1)["uri"].take(pa.array(image_ids - first))

    def _most_common(self) -> list[tuple[str, int]]:
        """The reasons and their counts; among equal counts, that of the first image comes first."""
        return sorted(self._counts.items(), key=lambda item: (-item[1], self._examples[item[0]]))


def too_many_errors(
    num_errors: int,
    num_images: int,
    max_error_rate: float,
    common: Sequence[tuple[str, int]],
    example_of: Callable[[str], str],
) -> InputError:
    """`common` are the reasons and their counts, most common first; `example_of` says which image failed for one."""
    shown = [f"{count:,} x {reason} (such as {example_of(reason)})" for reason, count in common[:REASONS_SHOWN]]
    reasons = ", ".join(shown) + (", ..." if len(common) > REASONS_SHOWN else "")
    return InputError(
        f"{num_errors:,} of {num_images:,} images cannot be used so far, more than embed.max_error_rate "
        f"({max_error_rate:g}) allows: {reasons}. Repair or remove them, or raise embed.max_error_rate; finished parts "
        "are kept"
    )


def _pieces(image_ids: Ids) -> Iterator[slice]:
    """Places of ascending ids that belong to the same range of ids."""
    edges = np.flatnonzero(np.diff(image_ids // IDS_TOGETHER)) + 1
    ends = [0, *edges.tolist(), len(image_ids)]
    yield from (slice(start, stop) for start, stop in pairwise(ends) if start < stop)


class ReusableParts:
    """The parts of a finished ``embed`` artifact."""

    def __init__(self, artifact: Artifact, listing: Listing) -> None:
        self.parts = plan_parts(len(listing), artifact.metrics["images_per_part"])
        self._artifact = artifact
        self._listing = listing
        self._files = dict(zip(self.parts, artifact.part_names(PART_PREFIX), strict=True))
        errors = artifact.read_table(ERRORS_NAME)
        self._failed_ids = errors["image_id"].to_numpy()
        self._reasons = errors["reason"]

    def record(self, part: PartRange) -> PartRecord:
        """The record that the part had."""
        first, last = np.searchsorted(self._failed_ids, [part.start, part.stop])
        errors = list(zip(self._failed_ids[first:last].tolist(), self._reasons[first:last].to_pylist(), strict=True))
        metrics = {"start": part.start, "num_images": part.num_images, "errors": errors, "num_embedded": 0}
        return PartRecord(name=part.name, files=(self._artifact.part(self._files[part]),), metrics=metrics)

    def reuse(self, part: PartRange, listing: Listing, records: PartRecords) -> PartRecord | None:
        """Take over a part, if there is one of the same images, for another artifact with this listing and these
        records: that refers to its file, and nothing is read. A part with images that may be tried again is copied,
        since that writes its file anew."""
        if part not in self._files:
            return None
        here, there = (images.table(part.start, part.stop).select(SAME) for images in (listing, self._listing))
        if not here.equals(there):
            return None
        record = self.record(part)
        (file,) = record.files
        owner = self._artifact.folder_of(file)
        if all(reason == REMOVED for _, reason in record.metrics["errors"]):
            if owner.size(file.name) != file.num_bytes:
                return None
            folder = file.folder or f"{owner.parent.path.rpartition('/')[2]}/{owner.path.rpartition('/')[2]}"
            return records.write(part.name, [file.model_copy(update={"folder": folder})], record.metrics)
        try:
            data = self._artifact.read_bytes(file.name)
        except DamagedArtifactError:
            return None
        check_claim(records.folder)
        if hashes := read_hashes(owner, file.name):
            write_hashes(records.folder, part.file_name, hashes)
        records.folder.write_bytes(part.file_name, data)
        file = file.model_copy(update={"name": part.file_name, "folder": None})
        return records.write(part.name, [file], record.metrics)


def reuse_parts(
    parts: Sequence[PartRange], listing: Listing, sources: Sequence[ReusableParts], records: PartRecords
) -> Iterator[tuple[PartRange, PartRecord | None]]:
    """Take over what the sources have of `parts`; each part, with None if no source has it."""

    def reuse(part: PartRange) -> PartRecord | None:
        found = (source.reuse(part, listing, records) for source in sources)
        return next((record for record in found if record is not None), None)

    with ThreadPoolExecutor(REUSE_THREADS) as threads:
        yield from zip(parts, threads.map(reuse, parts), strict=True)
