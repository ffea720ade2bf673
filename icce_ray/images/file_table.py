"""The files of a source, sorted, without repeats: a table on this machine's disk, so no process holds all names."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from icce_ray.images.sources import File

FETCH_ROWS = 10_000
COLUMNS = "uri, size_bytes, etag, is_container"


class FileTable:
    """Files by URI. The first of several that are named alike stays.

    Args:
        files: in any order.
        excluded_prefix: files whose URI begins so are left out.
    """

    def __init__(self, files: Iterable[File], excluded_prefix: str | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="icce_ray-files-")
        self._database = sqlite3.connect(Path(self._folder.name) / "files.sqlite", check_same_thread=False)
        self._database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE files (uri TEXT PRIMARY KEY, size_bytes INTEGER, etag TEXT, is_container INTEGER,"
            " is_known INTEGER DEFAULT 0) WITHOUT ROWID"
        )
        kept = (file for file in files if excluded_prefix is None or not file.uri.startswith(excluded_prefix))
        self._database.executemany(f"INSERT OR IGNORE INTO files ({COLUMNS}) VALUES (?, ?, ?, ?)", kept)
        self._database.commit()

    def __len__(self) -> int:
        count: int = self._database.execute("SELECT count(*) FROM files").fetchone()[0]
        return count

    @property
    def has_containers(self) -> bool:
        return self._database.execute("SELECT 1 FROM files WHERE is_container LIMIT 1").fetchone() is not None

    def __iter__(self) -> Iterator[File]:
        """All files in the order of their URIs (bytes of the UTF-8)."""
        return self._select("")

    def unknown(self) -> Iterator[File]:
        """Those that :meth:`find_again` did not meet, in order."""
        return self._select("WHERE NOT is_known")

    def find_again(self, uri: str, etag: str | None, *, is_container: bool) -> File | None:
        """The file `uri`, which from now on counts as known; None where it is gone, or a container that changed."""
        row = self._database.execute(f"SELECT {COLUMNS} FROM files WHERE uri = ?", (uri,)).fetchone()
        if row is None:
            return None
        file = File(row[0], row[1], row[2], bool(row[3]))
        if file.is_container != is_container or (is_container and file.etag != etag):
            return None
        self._database.execute("UPDATE files SET is_known = 1 WHERE uri = ?", (uri,))
        return file

    def digest(self) -> str:
        """64 hex digits that change when a file is added, removed or changed."""
        digest = hashlib.sha256()
        for file in self:
            fields = (file.uri, "" if file.size_bytes is None else str(file.size_bytes), file.etag or "")
            digest.update("\0".join(fields).encode() + b"\n")
        return digest.hexdigest()

    def _select(self, condition: str) -> Iterator[File]:
        cursor = self._database.execute(f"SELECT {COLUMNS} FROM files {condition} ORDER BY uri")
        while rows := cursor.fetchmany(FETCH_ROWS):
            yield from (File(uri, size, etag, bool(kind)) for uri, size, etag, kind in rows)
