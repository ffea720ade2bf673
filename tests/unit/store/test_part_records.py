from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from icce_ray.store import Artifact, ArtifactWriter, Folder, Part
from icce_ray.store.part_records import PartRecords


def write_file(folder: Folder, name: str, data: bytes = b"rows") -> Part:
    return ArtifactWriter(folder).write_bytes(name, data, rows=len(data))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.at(tmp_path / "artifact")


@pytest.fixture
def records(folder: Folder) -> PartRecords:
    return PartRecords(folder, "source")


def test_a_record_is_read_back_as_it_was_written(folder: Folder, records: PartRecords) -> None:
    files = [write_file(folder, "part-0-indptr.npy"), write_file(folder, "below/part-0.parquet", b"more rows")]
    written = records.write("part-0", files, {"num_edges": 3, "errors": [[1, "truncated"]]})
    assert records.read("part-0") == written
    assert written.name == "part-0"
    assert list(written.files) == files
    assert written.metrics == {"num_edges": 3, "errors": [[1, "truncated"]]}


def test_all_records_are_read_by_name(folder: Folder, records: PartRecords) -> None:
    written = {
        name: records.write(name, [write_file(folder, f"{name}.npy", name.encode())], {"name": name})
        for name in ("part-2", "part-0", "assignments/part-1")
    }
    assert records.read_all() == written
    assert list(records.read_all()) == ["assignments/part-1", "part-0", "part-2"]


def test_a_part_without_a_record_is_not_finished(folder: Folder, records: PartRecords) -> None:
    write_file(folder, "part-0.npy")
    assert records.read("part-0") is None
    assert records.read_all() == {}


def test_a_part_whose_bytes_changed_is_not_finished(folder: Folder, records: PartRecords) -> None:
    for name in ("part-0", "part-1"):
        records.write(name, [write_file(folder, f"{name}.npy")], {})
    folder.write_bytes("part-0.npy", b"rowz")
    assert records.read("part-0") is None
    assert list(records.read_all()) == ["part-1"]
    assert list(records.read_all(check_files=False)) == ["part-0", "part-1"]


def test_a_record_of_another_source_does_not_count(folder: Folder, records: PartRecords) -> None:
    records.write("part-0", [write_file(folder, "part-0.npy")], {})
    other = PartRecords(folder, "another source")
    assert other.read("part-0") is None
    assert other.read_all() == {}


@pytest.mark.parametrize("damage", ["file removed", "file of another size", "record cut off", "record of another kind"])
def test_a_record_counts_only_while_it_and_its_files_are_whole(
    folder: Folder, records: PartRecords, damage: str
) -> None:
    for name in ("part-0", "part-1"):
        records.write(name, [write_file(folder, f"{name}.npy"), write_file(folder, f"{name}.txt")], {})
    if damage == "file removed":
        folder.remove("part-0.txt")
    elif damage == "file of another size":
        folder.write_bytes("part-0.txt", b"row")
    elif damage == "record cut off":
        folder.write_bytes("records/part-0.json", folder.read_bytes("records/part-0.json")[:-2])
    else:
        folder.write_bytes("records/part-0.json", b'["source"]')
    assert records.read("part-0") is None
    assert list(records.read_all()) == ["part-1"]


def test_clearing_removes_the_records_and_leaves_the_parts(folder: Folder, records: PartRecords) -> None:
    records.write("part-0", [write_file(folder, "part-0.npy")], {})
    PartRecords(folder, "an older source").write("part-1", [write_file(folder, "part-1.npy")], {})
    records.clear()
    assert list(folder.sizes()) == ["part-0.npy", "part-1.npy"]
    assert folder.folder_names() == []


def test_a_worker_can_be_handed_the_records(folder: Folder, records: PartRecords) -> None:
    received = pickle.loads(pickle.dumps(records))
    written = received.write("part-0", [write_file(folder, "part-0.npy")], {})
    assert records.read("part-0") == written


@pytest.mark.parametrize("damage", ["remove", "truncate", "remove all"])
def test_a_record_of_a_file_that_another_artifact_no_longer_holds_does_not_count(tmp_path: Path, damage: str) -> None:
    owner, folder = Folder.at(tmp_path / "embed" / "base"), Folder.at(tmp_path / "embed" / "next")
    files = [write_file(owner, name).model_copy(update={"folder": "embed/base"}) for name in ("a.bin", "b.bin")]
    records = PartRecords(folder, "source")
    for file in files:
        records.write(file.name.removesuffix(".bin"), [file], {})
    assert list(records.read_all(check_files=False)) == ["a", "b"]
    if damage == "remove all":
        owner.clear()
    elif damage == "remove":
        owner.remove("a.bin")
    else:
        owner.write_bytes("a.bin", b"r")
    assert list(records.read_all(check_files=False)) == ([] if damage == "remove all" else ["b"])


def test_damage_in_a_file_that_another_artifact_holds_is_discarded_there_too(tmp_path: Path) -> None:
    owner, folder = Folder.at(tmp_path / "embed" / "base"), Folder.at(tmp_path / "embed" / "next")
    writer, records = ArtifactWriter(owner), PartRecords(folder, "source")
    for name in ("a.bin", "b.bin"):
        shared = writer.write_bytes(name, b"rows").model_copy(update={"folder": "embed/base"})
        records.write(name.removesuffix(".bin"), [shared], {})
    writer.commit(stage="embed", fingerprint="base", inputs={}, config={}, metrics={}, seconds=0.0)
    owner.write_bytes("a.bin", b"ROWS")
    records.discard_damage()
    assert list(records.read_all(check_files=False)) == ["b"]
    assert Artifact.find(owner) is None
    assert owner.names() == ["b.bin"]
