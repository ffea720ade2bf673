"""The index of image contents, per image: time, bytes of its messages, memory, and what its start reads.

`before` is a plain transcription of the index that was replaced: SQLite, hexadecimal hashes, embeddings on their way
through the index, a start that reads whole parts. Both are asked what embedding asks for each part of 512 images;
messages are pickled, as between processes. The part files of the start hold zeros, which compress: bytes read are
counted before compression.
"""

from __future__ import annotations

import hashlib
import pickle
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cases import show_aim
from icce_ray.embed.content_index import ContentIndex, keys_of
from icce_ray.embed.embedding_parts import PartRange, part_table, read_part, write_part
from icce_ray.store import Folder
from icce_ray.store.part_records import PartRecords

SETTINGS: dict[str, Any] = {"num_images": 200_000, "num_resumed": 2_000_000, "dim": 1024, "min_speedup": 8.0}
PART = 512
STORED_PART = 65_536


class Before:
    """What the index did, one row at a time."""

    def __init__(self) -> None:
        self.database = sqlite3.connect("")
        self.database.execute("CREATE TABLE content (hash BLOB PRIMARY KEY, place INTEGER, part TEXT) WITHOUT ROWID")
        self.claims: dict[str, str] = {}
        self.published: dict[str, Any] = {}

    def find(self, value: str) -> Any:
        query = "SELECT place, part FROM content WHERE hash = ?"
        return self.database.execute(query, (bytes.fromhex(value),)).fetchone()

    def known(self, hashes: list[str]) -> set[str]:
        return {value for value in hashes if self.find(value) is not None}

    def claim(self, part: str, hashes: list[str]) -> list[Any]:
        answers: list[Any] = []
        for value in hashes:
            found = self.find(value)
            if found is not None:
                answers.append(["at", *found])
            else:
                self.claims[value] = part
                answers.append(["yours"])
        return answers

    def publish(self, part: str, outcomes: dict[str, Any]) -> None:
        self.published[part] = outcomes

    def finish(self, part: str, hashes: list[str]) -> None:
        rows = ((bytes.fromhex(value), 0, part) for value in hashes)
        self.database.executemany("INSERT OR IGNORE INTO content VALUES (?, ?, ?)", rows)
        self.published.pop(part)
        for value in [value for value, holder in self.claims.items() if holder == part]:
            del self.claims[value]


class Meter:
    """Calls a method as from another process; adds up the bytes of the messages and the seconds of the index."""

    def __init__(self, index: Any) -> None:
        self.index, self.num_bytes, self.seconds = index, 0, 0.0

    def __call__(self, method: str, *arguments: Any) -> Any:
        sent = pickle.dumps(arguments, 5)
        began = time.process_time()
        answer = pickle.dumps(getattr(self.index, method)(*pickle.loads(sent)), 5)
        self.seconds += time.process_time() - began
        self.num_bytes += len(sent) + len(answer)
        return pickle.loads(answer)


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    num, dim = settings["num_images"] // PART * PART, settings["dim"]
    vectors = np.ones((PART, dim), np.float16)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Folder.at(Path(temporary))
        num_resumed = _write_parts(folder, settings["num_resumed"])

        old = Before()
        seconds, hashes = _seconds(lambda: read_part(folder, "part-00000.parquet")["content_hash"].to_pylist())
        seconds += _seconds(lambda: _insert(old, hashes))[0]
        meter = Meter(old)
        for number in range(num // PART):
            part, new = f"part-{number:05d}.parquet", _hashes(number)
            meter("known", new)
            meter("claim", part, new)
            meter("publish", part, dict(zip(new, vectors, strict=True)))
            meter("finish", part, new)
        (pages,), (size,) = (old.database.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
        kept = pages * size / (num + len(hashes))
        figures["before"] = _figures(meter, num, kept, seconds / len(hashes), 2 * dim + 8 + 64)

        seconds, index = _seconds(lambda: ContentIndex([folder], num))
        meter = Meter(index)
        for number in range(num // PART):
            part, keys = f"part-{number:05d}.parquet", keys_of(_hashes(number))
            meter("known", keys)
            meter("claim", part, keys)
            meter("finish", part, keys, np.arange(PART, dtype=np.uint32))
        table = index._table
        kept = (table.keys.nbytes + table.files.nbytes + table.rows.nbytes) / (num + num_resumed)
        figures["now"] = _figures(meter, num, kept, seconds / num_resumed, 8)
    print(f"{'per image':<8}" + "".join(f"{name:>18}" for name in figures["now"]))
    for kind, row in figures.items():
        print(f"{kind:<8}" + "".join(f"{value:>18.2f}" for value in row.values()))
    before, now, faster = figures["before"], figures["now"], settings["min_speedup"]
    for what, aim, keys in (
        ("us of CPU for an image", "under 3", ["us"]),
        ("bytes of messages and memory for an image", "under 100", ["message_bytes", "memory_bytes"]),
    ):
        counts = (sum(row[key] for key in keys) for row in (before, now))
        show_aim(what, *(f"{count:.1f}" for count in counts), aim)
    bounds = {
        f"at least {faster:g} times as fast": now["us"] * faster < before["us"],
        f"its start is at least {faster:g} times as fast": now["start_us"] * faster < before["start_us"],
        "under 100 bytes, messages and memory together": now["message_bytes"] + now["memory_bytes"] < 100,
    }
    return figures, bounds


def _figures(meter: Meter, num: int, kept: float, start_s: float, start_bytes: int) -> dict[str, float]:
    return {
        "us": 1e6 * meter.seconds / num,
        "message_bytes": meter.num_bytes / num,
        "memory_bytes": kept,
        "start_us": 1e6 * start_s,
        "start_bytes": start_bytes,
    }


def _hashes(number: int) -> list[str]:
    return [hashlib.sha256(f"{number} {row}".encode()).hexdigest() for row in range(PART)]


def _write_parts(folder: Folder, num: int) -> int:
    """Returns the number of rows."""
    vectors = np.zeros((STORED_PART, 1024), np.float16)
    for number in range(-(-num // STORED_PART)):
        digests = np.random.default_rng(number).bytes(32 * STORED_PART)
        hashes = pa.array([digests[i : i + 32].hex() for i in range(0, len(digests), 32)])
        table = part_table(np.arange(STORED_PART), vectors if number == 0 else vectors[:, :1], hashes)
        write_part(PartRecords(folder, ""), PartRange(number, 0, STORED_PART), table)
    return (number + 1) * STORED_PART


def _insert(before: Before, hashes: list[str]) -> None:
    rows = ((bytes.fromhex(value), 0, "part-00000.parquet") for value in hashes)
    before.database.executemany("INSERT OR IGNORE INTO content VALUES (?, ?, ?)", rows)


def _seconds(work: Any) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result
