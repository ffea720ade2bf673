from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.embed.embedding_parts import PartRange, part_table, read_hashes, write_part
from icce_ray.embed.part_hashes import hashes_name, num_hashes
from icce_ray.store import Folder
from icce_ray.store.part_records import PartRecords

HASHES = [sha256(bytes([number])).hexdigest() for number in (3, 1, 2)]


def write(folder: Folder, hashes: pa.Array | None) -> str:
    part = PartRange(0, 0, 3)
    table = part_table(np.arange(3), np.ones((3, 2), np.float16), hashes, model="m")
    write_part(PartRecords(folder, ""), part, table)
    return part.file_name


def hexadecimal(folder: Folder, name: str) -> list[str]:
    found = read_hashes(folder, name)
    assert found is not None
    return [bytes(row).hex() for row in found.hashes_nB]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "one hash less": lambda data: data[:-32],
    "a flipped bit": lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_hashes_are_made_again_from_their_part(tmp_path: Path, kind: str) -> None:
    folder = Folder.at(tmp_path)
    name = write(folder, pa.array(HASHES))
    path = tmp_path / hashes_name(name)
    whole = path.read_bytes()
    assert num_hashes(len(whole)) == 3
    damaged = DAMAGE[kind](whole)
    path.unlink() if damaged is None else path.write_bytes(damaged)
    assert hexadecimal(folder, name) == HASHES
    assert path.read_bytes() == whole


def test_intact_hashes_are_read_without_their_part(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    name = write(folder, pa.array(HASHES))
    (tmp_path / name).unlink()
    assert hexadecimal(folder, name) == HASHES
    (tmp_path / hashes_name(name)).unlink()
    assert read_hashes(folder, name) is None


@pytest.mark.parametrize("num_bytes", [8, 32])
@pytest.mark.parametrize("damage", ["none", "the last wanted byte", "more rows than are asked for"])
def test_the_ends_of_hashes_are_read_alone(tmp_path: Path, num_bytes: int, damage: str) -> None:
    folder = Folder.at(tmp_path)
    name = write(folder, pa.array(HASHES))
    path = tmp_path / hashes_name(name)
    whole = path.read_bytes()
    needed = 32 + 3 * num_bytes + 32 * {8: 1, 32: 2}[num_bytes]
    if damage == "none":
        (tmp_path / name).unlink()
        path.write_bytes(whole[:needed])
    elif damage == "the last wanted byte":
        path.write_bytes(whole[: needed - 33] + b"x" + whole[needed - 32 :])
    num_rows = 2 if damage == "more rows than are asked for" else 3
    found = read_hashes(folder, name, num_bytes, num_rows)
    assert found is not None
    assert [bytes(row).hex() for row in found.hashes_nB] == [value[-2 * num_bytes :] for value in HASHES]


def test_ready_made_embeddings_have_no_hashes(tmp_path: Path) -> None:
    name = write(Folder.at(tmp_path), None)
    assert not (tmp_path / hashes_name(name)).exists()
    assert read_hashes(Folder.at(tmp_path), name) is None
