from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.embed.embedding_parts import ERRORS_NAME, PartRange, part_table, plan_parts
from icce_ray.embed.finished_parts import ReusableParts, reuse_parts
from icce_ray.embed.part_hashes import read_hashes_file
from icce_ray.errors import WorkerError
from icce_ray.images.listing import Entry, Listing, entry_tables, numbered
from icce_ray.store import Artifact, ArtifactWriter, Folder
from icce_ray.store.part_records import PartRecords

ENTRIES = [Entry(f"/{number}.png", 100, f"time {number}") for number in range(10)]
FAILED = {1: "truncated", 5: "missing", 9: "truncated"}


def commit(writer: ArtifactWriter, **metrics: Any) -> Artifact:
    return writer.commit(stage="x", fingerprint="0", inputs={}, config={}, metrics=metrics, seconds=0.0)


def listing_of(folder: Path, entries: list[Entry]) -> Listing:
    writer = ArtifactWriter(Folder.at(folder))
    writer.write_table("images-00000.parquet", numbered(pa.concat_tables(entry_tables(entries))))
    return Listing(commit(writer))


@pytest.fixture
def source(tmp_path: Path) -> ReusableParts:
    """Embeddings of ENTRIES in parts of four."""
    writer = ArtifactWriter(Folder.at(tmp_path / "source"))
    for part in plan_parts(10, 4):
        ids = np.setdiff1d(np.arange(part.start, part.stop), list(FAILED))
        hashes = pa.array([f"{image_id:064x}" for image_id in ids])
        rows = np.repeat(ids[:, None], 2, axis=1).astype(np.float16)
        writer.write_table(part.file_name, part_table(ids, rows, hashes))
    columns = {"image_id": list(FAILED), "uri": ["?"] * 3, "reason": list(FAILED.values())}
    writer.write_table(ERRORS_NAME, pa.table(columns))
    return ReusableParts(commit(writer, images_per_part=4), listing_of(tmp_path / "images", ENTRIES))


def test_a_part_has_the_record_it_was_written_with(source: ReusableParts) -> None:
    records = [source.record(part) for part in source.parts]
    assert [record.name for record in records] == ["part-00000", "part-00001", "part-00002"]
    assert [record.metrics["errors"] for record in records] == [
        [(1, "truncated")],
        [(5, "missing")],
        [(9, "truncated")],
    ]
    assert [record.metrics["num_images"] for record in records] == [4, 4, 2]
    assert [record.files[0].rows for record in records] == [3, 3, 1]


def test_parts_of_the_same_images_are_taken_over_and_no_others(source: ReusableParts, tmp_path: Path) -> None:
    changed = [*ENTRIES[:6], ENTRIES[6]._replace(etag="later"), *ENTRIES[7:], Entry("/new.png", 100, "now")]
    listing, records = listing_of(tmp_path / "more", changed), PartRecords(Folder.at(tmp_path / "copy"), "source")
    copied = dict(reuse_parts(plan_parts(11, 4), listing, [source], records))
    assert [part.index for part, finished in copied.items() if finished is not None] == [0]
    finished = copied[PartRange(0, 0, 4)]
    assert finished is not None
    hashes = read_hashes_file(records.folder, "part-00000.parquet")
    assert hashes is not None
    assert [row.tobytes().hex() for row in hashes.hashes_nB] == [f"{number:064x}" for number in (0, 2, 3)]
    (record,) = records.read_all().values()
    assert (record.files, record.metrics["errors"]) == (finished.files, [[1, "truncated"]])
    # It has an image that may be tried again, so it is a copy.
    original = (tmp_path / "source" / "part-00000.parquet").read_bytes()
    assert (tmp_path / "copy" / "part-00000.parquet").read_bytes() == original


def test_nothing_is_copied_into_an_artifact_that_another_job_has_taken_over(
    source: ReusableParts, tmp_path: Path
) -> None:
    lost = replace(Folder.at(tmp_path / "copy"), claim="of a job that was killed")
    listing, records = listing_of(tmp_path / "same", ENTRIES), PartRecords(lost, "source")
    with pytest.raises(WorkerError, match="another job took this artifact over"):
        list(reuse_parts(source.parts, listing, [source], records))
    assert not (tmp_path / "copy").exists()


def test_a_damaged_part_is_not_copied(source: ReusableParts, tmp_path: Path) -> None:
    path = tmp_path / "source" / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    listing, records = listing_of(tmp_path / "same", ENTRIES), PartRecords(Folder.at(tmp_path / "copy"), "source")
    copied = reuse_parts(source.parts, listing, [source], records)
    assert [finished is not None for _, finished in copied] == [True, False, True]


def test_a_part_without_failed_images_is_referred_to_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "embed" / "base"
    writer = ArtifactWriter(Folder.at(path))
    for part in plan_parts(10, 4):
        ids = np.arange(part.start, part.stop)
        writer.write_table(part.file_name, part_table(ids, np.repeat(ids[:, None], 2, axis=1).astype(np.float16)))
    errors = pa.table({"image_id": pa.array([], pa.int64()), "reason": pa.array([], pa.string())})
    writer.write_table(ERRORS_NAME, errors)
    base = ReusableParts(commit(writer, images_per_part=4), listing_of(tmp_path / "images", ENTRIES))
    grown = listing_of(tmp_path / "grown", [*ENTRIES, Entry("/new.png", 1, "now")])
    records = PartRecords(Folder.at(tmp_path / "embed" / "next"), "source")
    with monkeypatch.context() as patched:
        patched.setattr(base, "_artifact", _Unread(base._artifact))
        found = dict(reuse_parts(plan_parts(11, 4), grown, [base], records))
    reused = [record for record in found.values() if record is not None]
    assert [record.files[0].folder for record in reused] == ["embed/base"] * 2
    assert [record.files for record in records.read_all().values()] == [record.files for record in reused]
    following = ArtifactWriter(records.folder)
    for record in reused:
        following.add(record.files[0])
    artifact = commit(following)
    ids = [artifact.read_table(name)["image_id"].to_pylist() for name in artifact.part_names()]
    assert ids == [[0, 1, 2, 3], [4, 5, 6, 7]]
    (path / "part-00001.parquet").unlink()
    assert base.reuse(base.parts[1], grown, records) is None


class _Unread:
    """An artifact whose parts must not be read."""

    def __init__(self, artifact: Artifact) -> None:
        self.part, self.folder_of = artifact.part, artifact.folder_of
