"""Which image contents have an embedding already, and where: the same bytes are never embedded twice.

The parts of this and earlier ``embed`` artifacts of the same model under the same output serve as the cache.
:class:`ContentIndex` indexes them on one machine's disk. It also knows which worker is about to embed which content, so
if two parts have the same bytes, one waits for the other's result.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy.typing as npt

from icce_ray.embed.decode_and_embed import Outcome
from icce_ray.embed.embedding_parts import is_part_file, read_hashes, read_part
from icce_ray.embed.feature_matrix import joined_columns
from icce_ray.errors import DamagedArtifactError
from icce_ray.store import Folder
from icce_ray.store.local_files import TEMPORARY

LOAD_THREADS = 16
MAX_HELD_PARTS = 32
WAIT_S = 0.05
MAX_WAIT_S = 120.0
"""Longest wait for another worker's embedding of the same content. After that the content is embedded here."""

Vector = npt.NDArray[Any]


class Index(Protocol):
    """The methods of a :class:`ContentIndex` that embedding needs, in this or in another process."""

    def claim(self, part: str, hashes: list[str], *, force: bool = False) -> list[Any]: ...

    def publish(self, part: str, outcomes: dict[str, Outcome]) -> None: ...

    def finish(self, part: str, hashes: list[str]) -> None: ...

    def forget(self, place: int, part: str) -> None: ...


class ContentIndex:
    """The index. Creating it reads the hashes of all parts in `folders`. Any thread may call :meth:`known`.

    Args:
        folders: ``embed`` artifacts of one model, finished or not; the first is the one being written.
    """

    def __init__(self, folders: Sequence[Folder]) -> None:
        self._database = sqlite3.connect(TEMPORARY, check_same_thread=False)
        self._database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE content (hash BLOB PRIMARY KEY, place INTEGER, part TEXT) WITHOUT ROWID"
        )
        self._lock = threading.Lock()
        self._claims: dict[str, str] = {}
        self._published: dict[str, dict[str, Outcome]] = {}
        for place, folder in enumerate(folders):
            names = [name for name in folder.names() if is_part_file(name)]
            with ThreadPoolExecutor(LOAD_THREADS) as threads:
                for name, found in zip(names, threads.map(partial(read_hashes, folder), names), strict=True):
                    self._insert(place, name, map(bytes.hex, map(bytes, found.hashes_nB)) if found else [])

    def __repr__(self) -> str:
        return "embed: content index"

    def known(self, hashes: list[str]) -> set[str]:
        """Those of `hashes` that have an embedding on storage."""
        return {value for value in hashes if self._find(value) is not None}

    def claim(self, part: str, hashes: list[str], *, force: bool = False) -> list[Any]:
        """Where the embedding of each hash is: ``["at", place, part]`` on storage; ``["here", outcome]`` embedded by a
        part that is not written yet; ``["yours"]`` to be embedded by `part`; ``["busy"]`` being embedded by another.

        Args:
            force: take contents over from a part that does not seem to finish.
        """
        answers: list[Any] = []
        for value in hashes:
            found = self._find(value)
            holder = self._claims.get(value)
            if found is not None:
                answers.append(["at", *found])
            elif holder is not None and value in self._published.get(holder, {}):
                answers.append(["here", self._published[holder][value]])
            elif holder in (None, part) or force:
                self._claims[value] = part
                answers.append(["yours"])
            else:
                answers.append(["busy"])
        return answers

    def publish(self, part: str, outcomes: dict[str, Outcome]) -> None:
        """Provide what `part` embedded to others until it is written."""
        self._published.setdefault(part, {}).update(outcomes)

    def finish(self, part: str, hashes: list[str]) -> None:
        """The part was written to the first folder, with the embeddings of `hashes`."""
        self._insert(0, part, hashes)
        self._published.pop(part, None)
        for value in [value for value, holder in self._claims.items() if holder == part]:
            del self._claims[value]

    def forget(self, place: int, part: str) -> None:
        """A part can no longer be read."""
        with self._lock:
            self._database.execute("DELETE FROM content WHERE place = ? AND part = ?", (place, part))

    def _insert(self, place: int, part: str, hashes: Iterable[str]) -> None:
        rows = ((bytes.fromhex(value), place, part) for value in hashes)
        with self._lock:
            self._database.executemany("INSERT OR IGNORE INTO content VALUES (?, ?, ?)", rows)

    def _find(self, value: str) -> tuple[int, str] | None:
        query = "SELECT place, part FROM content WHERE hash = ?"
        with self._lock:
            found: tuple[int, str] | None = self._database.execute(query, (bytes.fromhex(value),)).fetchone()
        return found


class VectorReader:
    """Reads single embeddings from parts; keeps the last parts it read."""

    def __init__(self, folders: Sequence[Folder]) -> None:
        self._folders = folders
        self._held: OrderedDict[tuple[int, str], tuple[dict[str, int], Vector]] = OrderedDict()

    def read(self, place: int, part: str, content_hash: str) -> Vector:
        """Raises DamagedArtifactError: the part is missing or damaged."""
        key = (place, part)
        if key not in self._held:
            table = read_part(self._folders[place], part)
            rows_of = {value: row for row, value in enumerate(table["content_hash"].to_pylist())}
            self._held[key] = rows_of, joined_columns(table)
            if len(self._held) > MAX_HELD_PARTS:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        rows, vectors = self._held[key]
        vector: Vector = vectors[rows[content_hash]]
        return vector


def gather(
    part: str,
    hashes: list[str],
    index: Index,
    reader: VectorReader,
    embed: Callable[[list[str]], dict[str, Outcome]],
) -> tuple[dict[str, Outcome], list[str]]:
    """Get an outcome for each content of a part: read it, take it from another part, or embed it here.

    Args:
        part: its name.
        hashes: contents, each once.
        embed: embeds the contents that are left to this part.

    Returns:
        The outcomes by hash, and the hashes that were embedded here.
    """
    outcomes: dict[str, Outcome] = {}
    embedded: list[str] = []
    missing, deadline = list(hashes), time.monotonic() + MAX_WAIT_S
    while missing:
        ours = []
        answers = index.claim(part, missing, force=time.monotonic() > deadline)
        for value, (kind, *found) in zip(missing, answers, strict=True):
            if kind == "yours":
                ours.append(value)
            elif kind == "here":
                outcomes[value] = found[0]
            elif kind == "at":
                try:
                    outcomes[value] = reader.read(found[0], found[1], value)
                except (DamagedArtifactError, KeyError):
                    index.forget(found[0], found[1])
        if ours:
            fresh = embed(ours)
            index.publish(part, fresh)
            outcomes |= fresh
            embedded += ours
            deadline = time.monotonic() + MAX_WAIT_S
        missing = [value for value in missing if value not in outcomes]
        if missing and not ours:
            time.sleep(WAIT_S)
    return outcomes, embedded


def siblings(root: Folder, own: Folder, model: str) -> list[Folder]:
    """The folders of other ``embed`` artifacts below `root` made by the same model, finished or not."""
    found = []
    for name in root.folder_names():
        folder = root / name
        if folder.uri == own.uri:
            continue
        first = next((part for part in folder.names() if is_part_file(part)), None)
        hashes = read_hashes(folder, first) if first is not None else None
        if hashes is not None and hashes.model == hashlib.sha256(model.encode()).digest():
            found.append(folder)
    return found
