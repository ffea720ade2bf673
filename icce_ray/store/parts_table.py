"""The parts of an artifact as columns of a Parquet file beside its manifest: a large artifact has millions."""

import hashlib
import io
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, field_validator

TEXT = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("folder", TEXT),
        ("num_bytes", pa.int64()),
        ("sha256", pa.binary(32)),
        ("rows", pa.int64()),
        ("dtype", TEXT),
        ("shape", pa.list_(pa.int64())),
    ]
)
ROWS_PER_GROUP = 16_384
"""Rows of the file that are read together."""
LEADS_OUT = r"^[./]*$|^/|\\|\x00|(^|/)\.\.(/|$)"
"""A table on storage may come from anywhere: its names must not lead out of the artifact's folder."""


class Part(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("name", "folder")
    @classmethod
    def _lies_below(cls, name: str | None) -> str | None:
        if name is not None and re.search(LEADS_OUT, name):
            raise ValueError(f"{name!r} is no name of a part")
        return name

    name: str
    num_bytes: int
    sha256: str
    rows: int | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    folder: str | None = None
    """The folder of another artifact that holds the file, below the output; None: the artifact's own."""


def table_bytes(table: pa.Table) -> bytes:
    """The file of a table of SCHEMA, sorted by name."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROWS_PER_GROUP)
    return sink.getvalue()


def parts_bytes(parts: Iterable[Part]) -> bytes:
    """The file of a table of these parts."""
    rows = [
        {**part.model_dump(), "sha256": bytes.fromhex(part.sha256)}
        for part in sorted(parts, key=lambda part: part.name)
    ]
    return table_bytes(pa.Table.from_pylist(rows, SCHEMA))


class PartsTable:
    """The parts in the order of their names. A call reads the row groups that it asks about, a few columns of each, and
    no call but :meth:`names` makes an object for each part. It keeps the group it read last. Raises ValueError (or one
    of Arrow's errors, which are ValueErrors): it is no table of parts."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file
        self._metadata = pq.read_metadata(file)
        if (schema := self._metadata.schema.to_arrow_schema()) != SCHEMA:
            raise ValueError(f"columns {schema.names}")
        self._firsts, self._lasts = list[str](), list[str]()
        for number in range(self._metadata.num_row_groups):
            table = self._read(number, ["name", "folder"])
            for names in (table["name"], table["folder"].unique().cast(pa.string())):
                if pc.any(pc.match_substring_regex(names, LEADS_OUT)).as_py():
                    raise ValueError("a name that leads out of the folder")
            if len(table):
                self._firsts.append(table["name"][0].as_py())
                self._lasts.append(table["name"][-1].as_py())
        self._whole = lru_cache(1)(lambda group: self._read(group, SCHEMA.names))

    def names(self, prefix: str = "") -> list[str]:
        return [name for table in self._tables(prefix, "name") for name in table["name"].to_pylist()]

    def part(self, name: str) -> Part:
        """Raises KeyError: there is no such part."""
        number = bisect_left(self._lasts, name)
        if number == len(self._lasts):
            raise KeyError(name)
        table = self._whole(number)
        row = bisect_left(range(len(table)), name, key=lambda row: table["name"][row].as_py())
        if row == len(table) or table["name"][row].as_py() != name:
            raise KeyError(name)
        (values,) = table.slice(row, 1).to_pylist()
        return Part(**{**values, "sha256": values["sha256"].hex()})

    def num_rows(self, prefix: str) -> npt.NDArray[np.int64]:
        rows = [table["rows"].fill_null(0).to_numpy() for table in self._tables(prefix, "rows")]
        return np.concatenate([np.empty(0, np.int64), *rows])

    def num_bytes(self, prefix: str) -> int:
        return sum(pc.sum(table["num_bytes"]).as_py() or 0 for table in self._tables(prefix, "num_bytes"))

    def checksum(self, prefix: str) -> str:
        digest = hashlib.sha256()
        for table in self._tables(prefix, "name", "sha256"):
            for name, content in zip(table["name"].to_pylist(), table["sha256"].to_pylist(), strict=True):
                digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()

    def folders(self) -> list[str]:
        tables = (table["folder"].drop_null().unique().cast(pa.string()) for table in self._tables("", "folder"))
        return list(dict.fromkeys(folder for found in tables for folder in found.to_pylist()))

    def own_parts_are_among(self, sizes: Mapping[str, int]) -> bool:
        """Whether the parts in the artifact's own folder have the `sizes` that a listing of it gives."""
        tables = self._tables("", "name", "folder", "num_bytes")
        columns = (table.filter(pc.is_null(table["folder"])).drop_columns("folder").to_pydict() for table in tables)
        return all(dict(zip(*own.values(), strict=True)).items() <= sizes.items() for own in columns)

    def _tables(self, prefix: str, *columns: str) -> Iterator[pa.Table]:
        """These columns of the parts whose names begin with `prefix`, group by group. Names are read at the ends of
        the range only, unless they are asked for."""
        num = len(prefix)
        first = bisect_left(self._lasts, prefix, key=lambda name: name[:num])
        for number in range(first, bisect_right(self._firsts, prefix, key=lambda name: name[:num])):
            if self._firsts[number].startswith(prefix) and self._lasts[number].startswith(prefix):
                yield self._read(number, columns)
            else:
                table = self._read(number, ["name", *columns])
                yield table.filter(pc.starts_with(table["name"], prefix))

    def _read(self, group: int, columns: Sequence[str]) -> pa.Table:
        # Opened anew: one that is open cannot be used by several threads.
        file = pq.ParquetFile(self._file, metadata=self._metadata)
        return file.read_row_group(group, list(dict.fromkeys(columns)), use_threads=False)
