"""The parts of an artifact as columns of a Parquet file beside its manifest: a large artifact has millions."""

from __future__ import annotations

import hashlib
import io
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

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
LEADS_OUT = r"^[./]*$|^/|\\|\x00|(^|/)\.\.(/|$)"
"""A table on storage may come from anywhere: its names must not lead out of the artifact's folder."""


class Part(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("name", "folder")
    @classmethod
    def _lies_below(cls, name: str | None) -> str | None:
        if name is not None:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name or not path.parts:
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


class PartsTable:
    """The parts in the order of their names. Parts whose names begin alike are neighbours, so that no method but
    :meth:`names` makes an object for each.

    Args:
        table: of SCHEMA, sorted by name.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()
        self._names = self._column("name")

    @classmethod
    def of(cls, parts: Iterable[Part]) -> PartsTable:
        rows = [
            {**part.model_dump(), "sha256": bytes.fromhex(part.sha256)}
            for part in sorted(parts, key=lambda part: part.name)
        ]
        return cls(pa.Table.from_pylist(rows, SCHEMA))

    @classmethod
    def from_bytes(cls, data: bytes) -> PartsTable:
        """Raises ValueError (or one of Arrow's errors, which are ValueErrors): it is no table of parts."""
        table = pq.read_table(pa.BufferReader(data))
        if table.schema != SCHEMA:
            raise ValueError(f"columns {table.schema.names}")
        for names in (table["name"], table["folder"].unique().cast(pa.string())):
            if pc.any(pc.match_substring_regex(names, LEADS_OUT)).as_py():
                raise ValueError("a name that leads out of the folder")
        return cls(table)

    def to_bytes(self) -> bytes:
        sink = io.BytesIO()
        pq.write_table(self._table, sink, compression="zstd", row_group_size=max(1, len(self)))
        return sink.getvalue()

    def __len__(self) -> int:
        return len(self._table)

    def names(self, prefix: str = "") -> list[str]:
        names: list[str] = self._names[self._rows_of(prefix)].to_pylist()
        return names

    def part(self, name: str) -> Part:
        """Raises KeyError: there is no such part."""
        row = bisect_left(range(len(self)), name, key=self._name)
        if row == len(self) or self._name(row) != name:
            raise KeyError(name)
        (values,) = self._table.slice(row, 1).to_pylist()
        return Part(**{**values, "sha256": values["sha256"].hex()})

    def num_rows(self, prefix: str) -> npt.NDArray[np.int64]:
        """The rows of each part; 0 where they are unknown."""
        rows: npt.NDArray[np.int64] = self._column("rows")[self._rows_of(prefix)].fill_null(0).to_numpy()
        return rows

    def num_bytes(self, prefix: str) -> int:
        """Of all parts together."""
        return pc.sum(self._column("num_bytes")[self._rows_of(prefix)]).as_py() or 0

    def checksum(self, prefix: str) -> str:
        """Of the names and the contents of all parts together."""
        digest = hashlib.sha256()
        for name, content in zip(self.names(prefix), self._column("sha256")[self._rows_of(prefix)], strict=True):
            digest.update(name.encode() + b"\0" + content.as_py())
        return digest.hexdigest()

    def folders(self) -> list[str]:
        """The folders of other artifacts that hold parts."""
        folders: list[str] = self._column("folder").drop_null().unique().cast(pa.string()).to_pylist()
        return folders

    def own_parts_are_among(self, sizes: Mapping[str, int]) -> bool:
        """Whether the parts in the artifact's own folder have the `sizes` that a listing of it gives."""
        own = self._table.filter(pc.is_null(self._column("folder")))
        return all(
            sizes.get(name) == size
            for name, size in zip(own["name"].to_pylist(), own["num_bytes"].to_pylist(), strict=True)
        )

    def _name(self, row: int) -> str:
        name: str = self._names[row].as_py()
        return name

    def _column(self, name: str) -> pa.Array:
        column = self._table[name]
        return column.chunk(0) if column.num_chunks else pa.array([], column.type)

    def _rows_of(self, prefix: str) -> slice:
        def start(row: int) -> str:
            return self._name(row)[: len(prefix)]

        rows = range(len(self))
        return slice(bisect_left(rows, prefix, key=start), bisect_right(rows, prefix, key=start))
