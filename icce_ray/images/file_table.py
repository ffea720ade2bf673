"""The files of a source, sorted and without repeats, in a table on disk: no process holds all names in memory."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from icce_ray.images.image_files import File

FETCH_ROWS = 10_000
COLUMNS = "uri, size_bytes, etag, is_container"


class FileTable:
    """Files by URI. Of several with the same URI, the first is kept.

    Args:
        files: in any order.
        excluded_prefix: files whose URI starts with it are left out.
    """

    def __init__(self, files: Iterable[File], excluded_prefix: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="icce_ray-files-")
        self._database = sqlite3.connect(Path(self._folder.name) / "files.sqlite", check_same_thread=False)
        self._database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE files (uri TEXT PRIMARY KEY, size_bytes INTEGER, etag TEXT, is_container INTEGER,"
            " is_known INTEGER DEFAULT 0) WITHOUT ROWID"
        )
        kept = (file for file in files if not file.uri.startswith(excluded_prefix))
        self._database.executemany(f"INSERT OR IGNORE INTO files ({COLUMNS}) VALUES (?, ?, ?, ?)", kept)
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
            fields = (file.uri, "" if file.size_bytes is None else str(file.size_bytes), file.etag or "")
            digest.update("\0".join(fields).encode() + b"\n")
        return digest.hexdigest()

    def _select(self, condition: str) -> Iterator[File]:
        cursor = self._database.execute(f"SELECT {COLUMNS} FROM files {condition} ORDER BY uri")
        while rows := cursor.fetchmany(FETCH_ROWS):
            yield from map(_file, rows)


def _file(row: tuple[str, int | None, str | None, int]) -> File:
    return File(*row[:3], is_container=bool(row[3]))
