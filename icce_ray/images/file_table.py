"""The files of a source, sorted and without repeats, in a table on disk: no process holds all names in memory."""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from icce_ray.store.local_files import TEMPORARY

FETCH_ROWS = 10_000
OTHER_NAME = "other name of a file that is listed already"
COLUMNS = "uri, size_bytes, etag, is_container, problem, identity, is_linked"


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


class FileTable:
    """Files by URI. Of several with the same URI, the first is kept; of several names of the same local file, the first
    in order, one that no symbolic link leads to before others.

    Args:
        files: in any order.
        skipped: what the source holds besides, by kind. Counted while `files` is read.
    """

    def __init__(self, files: Iterable[File], skipped: Counter[str] | None = None) -> None:
        self._database = sqlite3.connect(TEMPORARY, check_same_thread=False)
        self._database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE files (uri TEXT PRIMARY KEY, size_bytes INTEGER, etag TEXT, is_container INTEGER,"
            " problem TEXT, identity TEXT, is_linked INTEGER, is_known INTEGER DEFAULT 0) WITHOUT ROWID"
        )
        self._database.executemany(f"INSERT OR IGNORE INTO files ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", files)
        self._database.execute("CREATE INDEX identities ON files (identity, is_linked, uri)")
        other_names = self._database.execute(
            "DELETE FROM files WHERE EXISTS (SELECT 1 FROM files AS other WHERE other.identity = files.identity"
            " AND (other.is_linked, other.uri) < (files.is_linked, files.uri))"
        )
        self.skipped = Counter[str]() if skipped is None else skipped
        if other_names.rowcount:
            self.skipped[OTHER_NAME] += other_names.rowcount
        self._database.commit()

    def __iter__(self) -> Iterator[File]:
        """All files in the order of their URIs (bytes of the UTF-8)."""
        return self._select("")

    def unknown(self) -> Iterator[File]:
        """The files that :meth:`find_again` did not find, in order."""
        return self._select("WHERE NOT is_known")

    def find_again(self, uri: str, etag: str | None, is_container: bool) -> File | None:
        """Find the file `uri` and mark it as known. None if it is gone, or a container that changed."""
        row = self._database.execute(f"SELECT {COLUMNS} FROM files WHERE uri = ?", (uri,)).fetchone()
        file = None if row is None else _file(row)
        if file is None or file.is_container != is_container or (is_container and file.etag != etag):
            return None
        self._database.execute("UPDATE files SET is_known = 1 WHERE uri = ?", (uri,))
        return file

    def digest(self) -> str:
        """64 hex digits that change when a file is added, removed or changed."""
        digest = hashlib.sha256()
        for file in self:
            fields = (
                file.uri,
                "" if file.size_bytes is None else str(file.size_bytes),
                file.etag or "",
                file.problem or "",
            )
            digest.update("\0".join(fields).encode() + b"\n")
        return digest.hexdigest()

    def _select(self, condition: str) -> Iterator[File]:
        cursor = self._database.execute(f"SELECT {COLUMNS} FROM files {condition} ORDER BY uri")
        while rows := cursor.fetchmany(FETCH_ROWS):
            yield from map(_file, rows)


def _file(row: tuple[Any, ...]) -> File:
    uri, size_bytes, etag, is_container, problem, identity, is_linked = row
    return File(uri, size_bytes, etag, bool(is_container), problem, identity, bool(is_linked))
