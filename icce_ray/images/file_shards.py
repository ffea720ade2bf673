"""The files of all sources in the order of their URIs (bytes of the UTF-8), without repeats, in sorted shards.

Sources hand in sorted shards. Where these overlap they are merged; then they follow each other, so that whoever reads
them holds one at a time. Above MAX_ROWS_HELD, shards lie on storage.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from icce_ray.store import ArtifactWriter, Folder

SHARD_ROWS = 2**18
"""Files that are sorted together."""
MAX_ROWS_HELD = 2**21
"""Files of all shards that stay in memory."""
GROUP_ROWS = 2**13
"""Rows of each shard that a merge holds."""
OTHER_NAME = "other name of a file that is listed already"


class File(NamedTuple):
    """A file, and what tells whether it changed."""

    uri: str
    size_bytes: int | None
    etag: str | None
    """Object stores: the ETag or modification time. Local files: the modification time in ns. None: unknown."""
    is_container: bool = False
    problem: str | None = None
    """Why it cannot be used, if that is known already."""
    identity: str | None = None
    """Equal for names of the same local file: device, inode, size and time."""
    is_linked: bool = False
    """Whether a symbolic link leads to it."""


KINDS = (pa.string(), pa.int64(), pa.string(), pa.bool_(), pa.string(), pa.string(), pa.bool_())
SCHEMA = pa.schema(list(zip(File._fields, KINDS, strict=True)))


def files_table(files: Sequence[File]) -> pa.Table:
    """A table with a row for each file."""
    columns = list(zip(*files, strict=True)) or [()] * len(File._fields)
    return pa.table([pa.array(column, kind) for column, kind in zip(columns, KINDS, strict=True)], schema=SCHEMA)


def sorted_files(table: pa.Table) -> pa.Table:
    """Sorted by URI; of several rows with the same URI, the first."""
    table = table.take(pc.sort_indices(table, [("uri", "ascending")])).combine_chunks()
    uris = table["uri"]
    if len(uris) < 2:
        return table
    is_new = pa.concat_arrays([pa.array([True]), pc.not_equal(uris[1:], uris[:-1]).combine_chunks()])
    return table.filter(is_new)


def ends_of(table: pa.Table) -> tuple[str, str]:
    """The first and the last URI."""
    return table["uri"][0].as_py(), table["uri"][-1].as_py()


@dataclass(frozen=True)
class Shard:
    """Files in order, without repeats; at least one. `first` and `last` are URIs."""

    first: str
    last: str
    num_rows: int
    held: pa.Table | None = None
    """None: it lies on storage as the file `name` of `folder`."""
    folder: Folder | None = None
    name: str = ""

    @classmethod
    def hold(cls, table: pa.Table) -> Shard:
        return cls(*ends_of(table), len(table), table)

    @classmethod
    def write(cls, table: pa.Table, folder: Folder, name: str) -> Shard:
        ArtifactWriter(folder).write_table(name, table)
        return cls(*ends_of(table), len(table), None, folder, name)

    def load(self) -> pa.Table:
        if self.held is not None:
            return self.held
        assert self.folder is not None
        return pq.read_table(pa.BufferReader(self.folder.read_bytes(self.name)))

    def groups(self) -> Iterator[pa.Table]:
        """Its rows in small tables."""
        if self.num_rows <= GROUP_ROWS or self.folder is None:
            table = self.load()
            yield from (table.slice(start, GROUP_ROWS) for start in range(0, len(table), GROUP_ROWS))
            return
        with self.folder.filesystem.open_input_file(f"{self.folder.path}/{self.name}") as file:
            for batch in pq.ParquetFile(file).iter_batches(GROUP_ROWS):
                yield pa.Table.from_batches([batch])


def shards_of(files: Iterable[File], folder: Folder, prefix: str) -> Iterator[Shard]:
    """The shards of files that come in any order. The first stays in memory; others are written to `folder`."""
    files, number = iter(files), 0
    while batch := list(islice(files, SHARD_ROWS)):
        table = sorted_files(files_table(batch))
        yield Shard.write(table, folder, f"{prefix}-{number:06d}.parquet") if number else Shard.hold(table)
        number += 1


class FileShards:
    """All files, from shards in any order; those that do not fit into memory are written to `folder`. If several files
    have the same URI, the one in the first shard is kept. If a local file has several names, the first is kept; names
    that no symbolic link leads to come before others. `skipped` is what the sources hold besides, by kind."""

    def __init__(self, shards: Iterable[Shard], folder: Folder, skipped: Counter[str]) -> None:
        self.folder, self.skipped = folder, skipped
        self._num_held = self._num_written = 0
        self._shards: list[Shard] = []
        for group in _overlapping(list(shards)):
            self._shards += group if len(group) == 1 else map(self._keep, _merged(group))
        self._drop_other_names()
        self._firsts = [shard.first for shard in self._shards]
        self._is_known: dict[int, npt.NDArray[np.bool_]] = {}
        self._load = lru_cache(2)(lambda index: self._shards[index].load())

    def __len__(self) -> int:
        return sum(shard.num_rows for shard in self._shards)

    @property
    def is_on_storage(self) -> bool:
        return any(shard.held is None for shard in self._shards)

    def tables(self) -> Iterator[pa.Table]:
        """All files in order."""
        return (shard.load() for shard in self._shards)

    @cached_property
    def digest(self) -> str:
        """64 hex digits that change when a file is added, removed or changed."""
        digest = hashlib.sha256()
        for table in self.tables():
            fields = [table["uri"], table["size_bytes"].cast(pa.string()), table["etag"], table["problem"]]
            fields = [pc.fill_null(field, "") for field in fields]
            fields[-1] = pc.binary_join_element_wise(fields[-1], "\n", "")
            lines = pc.binary_join_element_wise(*fields, "\0")
            for chunk in lines.chunks:
                _, offsets, data = chunk.buffers()
                ends = np.frombuffer(offsets, np.int32)[[chunk.offset, chunk.offset + len(chunk)]]
                digest.update(memoryview(data or b"")[ends[0] : ends[1]])
        return digest.hexdigest()

    def find_again(self, wanted: Sequence[tuple[str, str | None, bool]]) -> list[File | None]:
        """Find files by (uri, etag, is_container) and mark them as known. None for one that is gone, and for a
        container that changed. Quick where the wanted ones are neighbours."""
        if not wanted or not self._shards:
            return [None] * len(wanted)
        uris = [uri for uri, _, _ in wanted]
        first = max(0, bisect.bisect_right(self._firsts, min(uris)) - 1)
        stop = bisect.bisect_right(self._firsts, max(uris))
        values = pa.array(uris, pa.string())
        found: dict[str, tuple[int, int, File]] = {}
        for index in range(first, stop):
            table = self._load(index)
            rows = np.flatnonzero(pc.is_in(table["uri"], values).to_numpy())
            columns = table.take(pa.array(rows)).to_pydict()
            for row, values_of_file in zip(rows.tolist(), zip(*columns.values(), strict=True), strict=True):
                found[values_of_file[0]] = index, row, File(*values_of_file)
        files: list[File | None] = []
        for uri, etag, is_container in wanted:
            index, row, file = found.get(uri, (0, 0, None))
            if file is None or file.is_container != is_container or (is_container and file.etag != etag):
                files.append(None)
                continue
            self._is_known.setdefault(index, np.zeros(self._shards[index].num_rows, np.bool_))[row] = True
            files.append(file)
        return files

    def unknown(self) -> Iterator[pa.Table]:
        """The files that :meth:`find_again` did not find, in order."""
        for index, table in enumerate(self.tables()):
            yield table.filter(pa.array(~self._is_known[index])) if index in self._is_known else table

    def _keep(self, table: pa.Table) -> Shard:
        if self._num_held + len(table) <= MAX_ROWS_HELD:
            self._num_held += len(table)
            return Shard.hold(table)
        self._num_written += 1
        return Shard.write(table, self.folder, f"merged-{self._num_written:06d}.parquet")

    def _drop_other_names(self) -> None:
        identities = [table["identity"] for table in self.tables() if table["identity"].null_count < len(table)]
        if not identities:
            return
        counts = pc.value_counts(pc.drop_null(pa.chunked_array([c for column in identities for c in column.chunks])))
        several = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        if not len(several):
            return
        rows = [table.filter(pc.is_in(table["identity"], several)) for table in self.tables()]
        names = pa.concat_tables(rows).select(["identity", "is_linked", "uri"]).to_pydict()
        best: dict[str, tuple[bool, str]] = {}
        for identity, *name in zip(*names.values(), strict=True):
            best[identity] = min(best.get(identity, tuple(name)), tuple(name))
        dropped = set(names["uri"]) - {uri for _, uri in best.values()}
        self.skipped[OTHER_NAME] += len(dropped)
        left = (table.filter(pc.invert(pc.is_in(table["uri"], pa.array(sorted(dropped))))) for table in self.tables())
        self._shards = [self._keep(table) for table in left if len(table)]


def _overlapping(shards: list[Shard]) -> Iterator[list[Shard]]:
    """Groups of shards that overlap, in order; within a group in the order in which they were given."""
    group: list[int] = []
    last = ""
    for number in sorted(range(len(shards)), key=lambda number: shards[number].first):
        if group and shards[number].first > last:
            yield [shards[member] for member in sorted(group)]
            group = []
        last = max(last, shards[number].last) if group else shards[number].last
        group.append(number)
    if group:
        yield [shards[member] for member in sorted(group)]


def _merged(shards: list[Shard]) -> Iterator[pa.Table]:
    """The files of overlapping shards in order, without repeats, in tables of about SHARD_ROWS."""
    readers = [shard.groups() for shard in shards]
    heads = [next(reader) for reader in readers]
    pieces: list[pa.Table] = []
    while heads:
        cut = min(head["uri"][-1].as_py() for head in heads)
        taken = []
        for number, head in enumerate(heads):
            stop = bisect.bisect_right(head["uri"], cut, key=lambda uri: uri.as_py())
            taken.append(head.slice(0, stop))
            heads[number] = head.slice(stop) if stop < len(head) else next(readers[number], SCHEMA.empty_table())
        pieces.append(sorted_files(pa.concat_tables(taken)))
        left = [number for number, head in enumerate(heads) if len(head)]
        heads, readers = [heads[number] for number in left], [readers[number] for number in left]
        if not heads or sum(map(len, pieces)) >= SHARD_ROWS:
            yield pa.concat_tables(pieces).combine_chunks()
            pieces = []
