from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.embed.embedding_parts import ERRORS_NAME, PartRange, part_table, plan_parts
from icce_ray.embed.part_hashes import read_hashes_file
from icce_ray.embed.reuse_parts import ReusableParts, copy_parts
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


def test_parts_of_the_same_images_are_copied_and_no_others(source: ReusableParts, tmp_path: Path) -> None:
    changed = [*ENTRIES[:6], ENTRIES[6]._replace(etag="later"), *ENTRIES[7:], Entry("/new.png", 100, "now")]
    listing, records = listing_of(tmp_path / "more", changed), PartRecords(Folder.at(tmp_path / "copy"), "source")
    copied = dict(copy_parts(plan_parts(11, 4), listing, [source], records))
    assert [part.index for part, finished in copied.items() if finished is not None] == [0]
    finished = copied[PartRange(0, 0, 4)]
    assert finished is not None
    hashes = read_hashes_file(records.folder, "part-00000.parquet")
    assert hashes is not None
    assert [row.tobytes().hex() for row in hashes.hashes_nB] == [f"{number:064x}" for number in (0, 2, 3)]
    (record,) = records.read_all().values()
    assert (record.files, record.metrics["errors"]) == (finished.files, [[1, "truncated"]])
    original = (tmp_path / "source" / "part-00000.parquet").read_bytes()
    assert (tmp_path / "copy" / "part-00000.parquet").read_bytes() == original


def test_a_damaged_part_is_not_copied(source: ReusableParts, tmp_path: Path) -> None:
    path = tmp_path / "source" / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    listing, records = listing_of(tmp_path / "same", ENTRIES), PartRecords(Folder.at(tmp_path / "copy"), "source")
    copied = copy_parts(source.parts, listing, [source], records)
    assert [finished is not None for _, finished in copied] == [True, False, True]
