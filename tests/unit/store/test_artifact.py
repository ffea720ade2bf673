import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from icce_ray.errors import DamagedArtifactError
from icce_ray.store import Artifact, ArtifactWriter, Folder, Part, fingerprint
from icce_ray.store import artifact as artifact_module
from icce_ray.store.artifact import MANIFEST_NAME


def write_artifact(folder: Folder) -> Artifact:
    writer = ArtifactWriter(folder)
    writer.write_array("labels.npy", np.arange(10, dtype=np.int32))
    writer.write_table("table.parquet", pa.table({"image_id": [1, 2, 3]}))
    writer.write_json("summary.json", {"anmi": 0.5})
    return writer.commit(
        stage="toy",
        fingerprint="f" * 16,
        inputs={"embed": "e"},
        config={"seed": 0},
        metrics={"num": 3},
        seconds=1.23456,
    )


def test_there_is_no_artifact_before_the_commit(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    ArtifactWriter(folder).write_json("summary.json", 1)
    assert Artifact.find(folder) is None


def test_an_artifact_is_found_and_read_as_it_was_written(tmp_path: Path) -> None:
    write_artifact(Folder.at(tmp_path))
    artifact = Artifact.find(Folder.at(tmp_path))
    assert artifact is not None
    assert artifact.part_names() == ["labels.npy", "summary.json", "table.parquet"]
    assert np.array_equal(artifact.read_array("labels.npy"), np.arange(10))
    assert artifact.read_table("table.parquet")["image_id"].to_pylist() == [1, 2, 3]
    assert artifact.read_json("summary.json") == {"anmi": 0.5}
    assert artifact.part("table.parquet").rows == 3
    assert artifact.part("labels.npy").dtype == "int32"
    assert artifact.manifest.inputs == {"embed": "e"}
    assert artifact.manifest.libraries["numpy"] == np.__version__


def test_a_table_in_pieces_is_read_as_a_whole_and_one_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    writer, schema = ArtifactWriter(Folder.at(tmp_path)), pa.schema([("image_id", pa.int64())])

    def pieces(stop: int) -> Iterator[pa.Table]:
        yield from (pa.table({"image_id": [2 * number, 2 * number + 1]}) for number in range(2))
        if stop:
            raise OSError("the next piece is lost")

    part = writer.write_tables("table.parquet", schema, pieces(0))
    data = (tmp_path / "table.parquet").read_bytes()
    assert (part.rows, part.num_bytes, part.sha256) == (4, len(data), hashlib.sha256(data).hexdigest())
    assert pq.read_table(tmp_path / "table.parquet")["image_id"].to_pylist() == [0, 1, 2, 3]
    with pytest.raises(OSError, match="lost"):
        writer.write_tables("table.parquet", schema, pieces(1))
    assert (tmp_path / "table.parquet").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]


def test_a_commit_removes_what_killed_workers_left_of_their_writes_and_nothing_else(tmp_path: Path) -> None:
    folder, others = (
        Folder.at(tmp_path),
        {".writer.json", ".part.decode", "below/notes.0123456789abcdef0123456789abcdef"},
    )
    for name in others:
        folder.write_bytes(name, b"in use")
    with pytest.MonkeyPatch.context() as killed:
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        killed.setattr(os, "fsync", lambda _: _interrupt())
        for name in ("part-00000.parquet", "below/part-00000.json"):
            with pytest.raises(KeyboardInterrupt):
                folder.write_bytes(name, b"half of it")
    assert len(folder.sizes()) == len(others) + 2
    artifact = write_artifact(folder)
    assert set(folder.sizes()) == others | set(artifact.file_names())


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_arrays_cannot_be_written_through(tmp_path: Path) -> None:
    labels = write_artifact(Folder.at(tmp_path)).read_array("labels.npy")
    with pytest.raises(ValueError, match="read-only"):
        labels[0] = 1


@pytest.mark.parametrize("name", ["labels.npy", "table.parquet", "summary.json"])
def test_one_changed_byte_is_noticed(tmp_path: Path, name: str) -> None:
    write_artifact(Folder.at(tmp_path))
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    artifact = Artifact.find(Folder.at(tmp_path))
    assert artifact is not None
    with pytest.raises(DamagedArtifactError, match=name):
        artifact.read_array(name) if name.endswith(".npy") else artifact.read_bytes(name)


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_part_that_is_short_or_gone_makes_the_artifact_unfinished(tmp_path: Path, damage: str) -> None:
    write_artifact(Folder.at(tmp_path))
    part = tmp_path / "labels.npy"
    part.unlink() if damage == "remove" else part.write_bytes(part.read_bytes()[:-1])
    assert Artifact.find(Folder.at(tmp_path)) is None


def test_a_manifest_that_is_no_manifest_makes_the_artifact_unfinished(tmp_path: Path) -> None:
    write_artifact(Folder.at(tmp_path))
    (tmp_path / MANIFEST_NAME).write_text("{}")
    assert Artifact.find(Folder.at(tmp_path)) is None


def test_damage_is_discarded_and_sound_parts_stay(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    write_artifact(folder)
    (tmp_path / "labels.npy").write_bytes(b"?" * (tmp_path / "labels.npy").stat().st_size)
    assert Artifact.discard_damage(folder) == ["labels.npy"]
    assert folder.names() == ["summary.json", "table.parquet"]


def test_nothing_is_discarded_from_a_sound_artifact(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    write_artifact(folder)
    assert Artifact.discard_damage(folder) == []
    assert Artifact.find(folder) is not None


def test_a_remote_part_is_copied_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICCE_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "bucket"
    base.mkdir()
    remote = Folder(pafs.SubTreeFileSystem(str(base), pafs.LocalFileSystem()), "toy", "fake://bucket/toy")
    remote.filesystem.create_dir("toy")
    artifact = write_artifact(remote)
    assert np.array_equal(artifact.read_array("labels.npy"), np.arange(10))
    (base / "toy" / "labels.npy").unlink()
    assert np.array_equal(artifact.read_array("labels.npy"), np.arange(10))


def test_an_artifact_that_comes_from_another_machine_is_copied_to_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Folder(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "remote", "remote://x")
    remote.filesystem.create_dir("remote")
    artifact = write_artifact(remote)
    monkeypatch.setenv("ICCE_CACHE", str(tmp_path / "sender"))
    expected = artifact.read_array("labels.npy")
    monkeypatch.setenv("ICCE_CACHE", str(tmp_path / "receiver"))
    received = pickle.loads(pickle.dumps(artifact))
    assert np.array_equal(received.read_array("labels.npy"), expected)
    assert list((tmp_path / "receiver").rglob("*-labels.npy"))


def test_the_fingerprint_depends_on_all_that_determines_the_content_and_not_on_order() -> None:
    base = fingerprint("heads", 1, {"a": 1, "b": [2]}, {"embed": "x"})
    assert base == fingerprint("heads", 1, {"b": [2], "a": 1}, {"embed": "x"})
    others = [
        fingerprint("embed", 1, {"a": 1, "b": [2]}, {"embed": "x"}),
        fingerprint("heads", 2, {"a": 1, "b": [2]}, {"embed": "x"}),
        fingerprint("heads", 1, {"a": 2, "b": [2]}, {"embed": "x"}),
        fingerprint("heads", 1, {"a": 1, "b": [2]}, {"embed": "y"}),
    ]
    assert len({base, *others}) == 5


def test_a_file_is_copied_as_a_part_and_found_again(tmp_path: Path) -> None:
    source = tmp_path / "weights.bin"
    source.write_bytes(bytes(range(256)) * 5000)
    writer = ArtifactWriter(Folder.at(tmp_path / "artifact"))
    part = writer.copy_file("copy.bin", str(source))
    assert part.num_bytes == 256 * 5000
    artifact = writer.commit(stage="x", fingerprint="f", inputs={}, config={}, metrics={}, seconds=0)
    source.unlink()
    assert artifact.local_file("copy.bin").read_bytes() == bytes(range(256)) * 5000
    (tmp_path / "artifact" / "copy.bin").write_bytes(b"x" * 256 * 5000)
    with pytest.raises(DamagedArtifactError, match=r"copy\.bin"):
        Artifact(artifact.folder, artifact.manifest).local_file("copy.bin")


@pytest.mark.parametrize("column", ["name", "folder"])
@pytest.mark.parametrize("name", ["../../victim", "/etc/passwd", "a/../../victim", "a\\\\b", "", "."])
def test_a_table_whose_names_lead_out_of_its_folder_is_no_artifact(tmp_path: Path, name: str, column: str) -> None:
    (tmp_path / "victim").write_text("precious")
    folder = Folder.at(tmp_path / "stage" / "artifact")
    manifest = write_artifact(folder).manifest
    table = pq.read_table(tmp_path / "stage" / "artifact" / manifest.parts.name)
    names = pa.array([name] * 3).cast(table.schema.field(column).type)
    pq.write_table(table.set_column(table.schema.names.index(column), column, names), tmp_path / "forged")
    forged = (tmp_path / "forged").read_bytes()
    file = {"num_bytes": len(forged), "sha256": hashlib.sha256(forged).hexdigest()}
    folder.write_bytes(manifest.parts.name, forged)
    parts = manifest.parts.model_copy(update=file)
    folder.write_bytes(MANIFEST_NAME, manifest.model_copy(update={"parts": parts}).model_dump_json().encode())
    assert Artifact.find(folder) is None
    assert Artifact.discard_damage(folder) == [MANIFEST_NAME]
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("large_bytes", [0, 2**22])
@pytest.mark.parametrize("damage", ["truncate", "remove", "change"])
def test_an_artifact_without_its_table_of_parts_is_unfinished(
    tmp_path: Path, damage: str, large_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_module, "LARGE_TABLE_BYTES", large_bytes)
    table = tmp_path / write_artifact(Folder.at(tmp_path)).manifest.parts.name
    data = table.read_bytes()
    table.unlink() if damage == "remove" else table.write_bytes(data[:-1] + (b"?" if damage == "change" else b""))
    assert Artifact.find(Folder.at(tmp_path)) is None
    assert Artifact.discard_damage(Folder.at(tmp_path)) == [MANIFEST_NAME]
    assert (tmp_path / "labels.npy").exists()


def test_a_large_artifact_is_found_without_a_listing_and_damage_is_noticed_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_module, "MAX_LISTED_PARTS", 2)
    monkeypatch.setattr(artifact_module, "LARGE_TABLE_BYTES", 0)
    write_artifact(Folder.at(tmp_path))
    (tmp_path / "labels.npy").unlink()
    monkeypatch.setattr(Folder, "sizes", lambda folder, **_: pytest.fail("listed"))
    artifact = Artifact.find(Folder.at(tmp_path))
    assert artifact is not None
    with pytest.raises(DamagedArtifactError, match=r"labels\.npy: the part is missing"):
        artifact.read_array("labels.npy")
    assert Artifact.discard_damage(artifact.folder) == ["labels.npy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["summary.json", "table.parquet"]


def test_a_part_may_lie_in_the_folder_of_another_artifact(tmp_path: Path) -> None:
    first = write_artifact(Folder.at(tmp_path / "toy" / "first"))
    writer = ArtifactWriter(Folder.at(tmp_path / "toy" / "second"))
    for name in ("labels.npy", "table.parquet"):
        writer.add(first.part(name).model_copy(update={"folder": "toy/first"}))
    writer.commit(stage="toy", fingerprint="s", inputs={}, config={}, metrics={}, seconds=0)
    second = Artifact.find(writer.folder)
    assert second is not None
    assert second.read_array("labels.npy").tolist() == list(range(10))
    assert second.read_table("table.parquet")["image_id"].to_pylist() == [1, 2, 3]
    (tmp_path / "toy" / "first" / "labels.npy").write_bytes(b"?")
    assert Artifact.discard_damage(writer.folder) == ["labels.npy"]
    # The file is of use to neither; without it, nobody refers to it again.
    assert not (tmp_path / "toy" / "first" / "labels.npy").exists()
    assert Artifact.find(first.folder) is None


def test_a_file_that_is_sound_for_its_owner_stays_when_another_artifact_refers_to_older_bytes(tmp_path: Path) -> None:
    first = write_artifact(Folder.at(tmp_path / "toy" / "first"))
    writer = ArtifactWriter(Folder.at(tmp_path / "toy" / "second"))
    writer.add(first.part("labels.npy").model_copy(update={"folder": "toy/first"}))
    writer.write_json("own.json", 1)
    writer.commit(stage="toy", fingerprint="s", inputs={}, config={}, metrics={}, seconds=0)
    amending = ArtifactWriter(first.folder)
    amending.write_array("labels.npy", np.arange(7))
    amending.commit(stage="toy", fingerprint="f", inputs={}, config={}, metrics={}, seconds=0)
    assert Artifact.discard_damage(writer.folder) == ["labels.npy"]
    assert Artifact.find(writer.folder) is None
    assert Artifact.discard_damage(first.folder) == []
    amended = Artifact.find(first.folder)
    assert amended is not None
    assert len(amended.read_array("labels.npy")) == 7


def test_artifacts_that_refer_to_each_other_or_themselves_can_be_discarded(tmp_path: Path) -> None:
    names = ("first", "second")
    for owner, other in (names, names[::-1]):
        writer = ArtifactWriter(Folder.at(tmp_path / "toy" / owner))
        for name, folder in ((other, other), (owner, owner)):
            writer.add(Part(name=f"{name}.bin", num_bytes=1, sha256="0" * 64, folder=f"toy/{folder}"))
        writer.commit(stage="toy", fingerprint="s", inputs={}, config={}, metrics={}, seconds=0)
    assert Artifact.discard_damage(writer.folder) == ["first.bin", "second.bin"]
    assert not (tmp_path / "toy" / "first" / MANIFEST_NAME).exists()


def test_the_manifest_does_not_grow_with_the_parts(tmp_path: Path) -> None:
    sizes = []
    for count in (10, 1000):
        writer = ArtifactWriter(Folder.at(tmp_path / str(count)))
        for number in range(count):
            writer.add(Part(name=f"part-{number}", num_bytes=1, sha256=f"{number:064x}"))
        writer.commit(stage="toy", fingerprint="s", inputs={}, config={}, metrics={}, seconds=0)
        sizes.append((tmp_path / str(count) / MANIFEST_NAME).stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 10


def test_amending_leaves_the_old_table_until_the_new_manifest_is_there(tmp_path: Path) -> None:
    first = write_artifact(Folder.at(tmp_path))
    writer = ArtifactWriter(first.folder)
    writer.write_json("more.json", 1)
    second = writer.commit(stage="toy", fingerprint="f", inputs={}, config={}, metrics={}, seconds=0)
    assert first.file_names()[-2:] == [first.manifest.parts.name, MANIFEST_NAME]
    assert first.manifest.parts.name != second.manifest.parts.name
    assert first.part_names() == pickle.loads(pickle.dumps(first)).part_names()
