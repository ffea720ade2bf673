"""Work items: the images of a part that a worker embeds at once.

A part of a large collection has many. Each is written to a file of its own, with a record, so that little is lost with
a worker. When the last item of a part is there, they are joined to the part's file. Items are also what is done when
images that failed are tried again: the part is then joined from its earlier file and the items.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from icce_ray.embed.content_index import Index, to_keys
from icce_ray.embed.embedding_parts import ITEM, PartRange, read_hashes, read_part, write_part
from icce_ray.embed.feature_matrix import Draw
from icce_ray.embed.part_hashes import KEY_BYTES, names_beside
from icce_ray.store import Folder, PartRecord, PartRecords

JOINS_AT_ONCE = 8


@dataclass(frozen=True)
class WorkItems(Sequence[PartRange]):
    """The work items of a part, made when they are asked for. A part that is a single item is done without a join."""

    part: PartRange
    images_per_item: int

    def __len__(self) -> int:
        return -(-self.part.num_images // self.images_per_item)

    def __getitem__(self, number: int) -> PartRange:  # type: ignore[override]
        if not 0 <= number < len(self):
            raise IndexError(number)
        if len(self) == 1 and not self.part.revision:
            return self.part
        start = self.part.start + number * self.images_per_item
        stop = min(start + self.images_per_item, self.part.stop)
        return replace(self.part, kind=ITEM, index=start // self.images_per_item, start=start, stop=stop)

    def with_images(self, image_ids: Sequence[int]) -> list[PartRange]:
        """The items that hold some images, given ascending, with these images alone."""
        chosen: dict[int, list[int]] = {}
        for image_id in image_ids:
            chosen.setdefault((image_id - self.part.start) // self.images_per_item, []).append(image_id)
        return [replace(self[number], only=tuple(ids)) for number, ids in chosen.items()]


@dataclass(frozen=True)
class OpenPart:
    """A part that is not finished."""

    part: PartRange
    items: Sequence[PartRange]
    earlier: PartRecord | None = None
    """The record of the part that this one amends."""

    @property
    def is_item(self) -> bool:
        return self.part.revision == 0 and len(self.items) == 1


class OpenParts(Iterable[PartRange]):
    """The parts of a run that are not finished, in order. Iterating gives the work items that are left to do; `done`
    are the records of those that an earlier run has done, by name."""

    def __init__(self, parts: Sequence[OpenPart], done: dict[str, PartRecord]) -> None:
        self._parts = parts
        self._starts = [part.part.start for part in parts]
        self._left = [len(part.items) for part in parts]
        self._records: dict[int, list[PartRecord]] = {}
        self.done: dict[str, PartRecord] = {}
        for record in done.values():
            number = self._number(record)
            if number >= 0 and any(item.name == record.name for item in parts[number].items):
                self.done[record.name] = record
        self.whole = [found for record in self.done.values() if (found := self.add(record)) is not None]
        """Parts whose items are all done: only the join is missing."""

    def __len__(self) -> int:
        """Number of items left to do."""
        return sum(self._left)

    @property
    def num_images(self) -> int:
        """Number of images of all parts."""
        return sum(part.part.num_images for part in self._parts)

    @property
    def images_per_item(self) -> int:
        return max((part.items[0].num_images for part in self._parts), default=0)

    def __iter__(self) -> Iterator[PartRange]:
        for part in self._parts:
            yield from (item for item in part.items if item.name not in self.done)

    def add(self, record: PartRecord) -> tuple[OpenPart, list[PartRecord]] | None:
        """Take in the record of an item. Returns its part with the records of all items, if this was the last one."""
        number = self._number(record)
        self._records.setdefault(number, []).append(record)
        self._left[number] -= 1
        if self._left[number]:
            return None
        return self._parts[number], sorted(self._records.pop(number), key=lambda item: item.metrics["start"])

    def _number(self, record: PartRecord) -> int:
        return bisect_right(self._starts, record.metrics["start"]) - 1


def joined(
    finished: Iterable[PartRecord], open_parts: OpenParts, join: Callable[[OpenPart, list[PartRecord]], PartRecord]
) -> Iterator[PartRecord]:
    """The records of items as they are `finished`, and after each part's last item that of the joined part. `join` is
    :func:`join_items`, here or in another process; it is called in threads."""
    joins: deque[Future[PartRecord]] = deque()
    with ThreadPoolExecutor(JOINS_AT_ONCE) as threads:
        joins.extend(threads.submit(join, *whole) for whole in open_parts.whole)
        for record in finished:
            yield record
            whole = open_parts.add(record)
            if whole is not None and not whole[0].is_item:
                joins.append(threads.submit(join, *whole))
            while joins and joins[0].done():
                yield joins.popleft().result()
        for future in joins:
            yield future.result()


def join_items(
    records: PartRecords, draw: Draw | None, index: Index, whole: OpenPart, items: Sequence[PartRecord]
) -> PartRecord:
    """Write a part from its finished items, record it, and remove the items' files. These stay until the part is
    recorded, so a worker that is killed in between loses nothing. Returns the part's record, with `joined` in its
    metrics: its images have been counted with the items. A part that is amended and has no more images than before
    keeps its earlier file. Raises DamagedArtifactError: a file is missing or damaged."""
    # A worker that died may have recorded the part already, and removed some of the items.
    record = records.read(whole.part.name) or _write_joined(records, draw, whole, items)
    (file,) = record.files
    if file.name == whole.part.file_name:
        hashes = read_hashes(records.folder, file.name, KEY_BYTES, file.rows)
        if hashes is not None:  # the index knows the contents in the items' files, which go now
            index.finish(file.name, to_keys(hashes.hashes_nB), np.arange(len(hashes.hashes_nB), dtype=np.uint32))
    for item in items:
        records.remove(item.name)
        for file in item.files:
            for name in (file.name, *names_beside(file.name)):
                records.folder.remove(name)
    return record


def _write_joined(records: PartRecords, draw: Draw | None, whole: OpenPart, items: Sequence[PartRecord]) -> PartRecord:
    files = [file for record in items for file in record.files]
    errors = [tuple(error) for record in items for error in record.metrics["errors"]]
    counts = {name: sum(record.metrics.get(name, 0) for record in items) for name in ("num_embedded", "num_stretched")}
    if whole.earlier is not None and not any(file.rows for file in files):
        metrics = {"start": whole.part.start, "num_images": whole.part.num_images, "errors": errors, "joined": True}
        return records.write(whole.part.name, whole.earlier.files, metrics | counts)
    earlier = whole.earlier.files if whole.earlier is not None else ()
    tables = [read_part(records.folder, file.name, file.sha256) for file in (*earlier, *files)]
    table = pa.concat_tables(tables)
    if earlier:
        table = table.sort_by("image_id")
    table = table.combine_chunks().replace_schema_metadata(tables[0].schema.metadata)
    return write_part(records, whole.part, table, errors, draw, joined=True, **counts)


def remove_items(folder: Folder) -> None:
    """Remove the items' files that a killed run has left."""
    for name in folder.names():
        if name.startswith(f"{ITEM}-"):
            folder.remove(name)
