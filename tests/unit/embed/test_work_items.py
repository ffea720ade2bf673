"""Work items and the parts they are joined to, against parts that were written at once."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.embed.embedding_parts import PartRange, part_table, plan_parts, read_part, write_part
from icce_ray.embed.part_hashes import hashes_name
from icce_ray.embed.work_items import OpenPart, OpenParts, WorkItems, join_items, joined, remove_items
from icce_ray.errors import DamagedArtifactError
from icce_ray.store import Folder, PartRecord, PartRecords

BAD = {3: "truncated", 21: "missing", 22: "missing", 40: "truncated"}
SIZE = 4


class NoIndex:
    """Told where contents lie; knows nothing else."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def finish(self, *values: Any) -> None:
        self.told.append(values)


def table_of(image_ids: list[int]) -> pa.Table:
    ids = np.array(image_ids, dtype=np.int64)
    hashes = pa.array([f"{image_id:064x}" for image_id in image_ids], pa.string())
    return part_table(ids, np.repeat(ids[:, None], 3, axis=1).astype(np.float16), hashes, model="m")


def write(records: PartRecords, item: PartRange, bad: dict[int, str] = BAD) -> PartRecord:
    covered = item.only or range(item.start, item.stop)
    errors = [(image_id, bad[image_id]) for image_id in covered if image_id in bad]
    good = [image_id for image_id in covered if image_id not in bad]
    return write_part(records, item, table_of(good), errors, num_embedded=len(good), num_stretched=1)


def open_parts(done: dict[str, PartRecord] | None = None) -> OpenParts:
    parts = plan_parts(45, 4 * SIZE)
    return OpenParts([OpenPart(part, WorkItems(part, SIZE)) for part in parts], done or {})


def embed(folder: Path, pending: OpenParts, order: Any) -> list[PartRecord]:
    records = PartRecords(Folder.at(folder), "source")
    items = list(pending)
    order.shuffle(items)
    return list(joined((write(records, item) for item in items), pending, lambda *whole: join(records, *whole)))


def join(records: PartRecords, whole: OpenPart, items: list[PartRecord], index: Any = None) -> PartRecord:
    return join_items(records, None, index or NoIndex(), whole, items)


def test_items_cover_their_part_and_have_names_of_their_own() -> None:
    parts = plan_parts(45, 4 * SIZE)
    items = [item for part in parts for item in WorkItems(part, SIZE)]
    assert [image_id for item in items for image_id in range(item.start, item.stop)] == list(range(45))
    assert [item.name for item in items] == [f"item-{number:05d}" for number in range(12)]
    assert list(WorkItems(parts[0], 16)) == [parts[0]]
    assert list(WorkItems(parts[2], 16)) == [parts[2]]


@pytest.mark.parametrize("seed", range(3))
def test_joined_parts_have_the_content_of_parts_written_at_once_and_the_same_bytes_in_any_order(
    tmp_path: Path, seed: int
) -> None:
    pending = open_parts()
    assert len(pending) == 12
    found = embed(tmp_path / "items", pending, random.Random(seed))
    whole = PartRecords(Folder.at(tmp_path / "whole"), "source")
    expected = [write(whole, part) for part in plan_parts(45, 4 * SIZE)]
    made = sorted((record for record in found if record.metrics.get("joined")), key=lambda record: record.name)
    assert [record.metrics["errors"] for record in made] == [record.metrics["errors"] for record in expected]
    assert [record.metrics["num_embedded"] for record in made] == [15, 14, 12]
    assert [record.metrics["num_stretched"] for record in made] == [4, 4, 4]
    in_order = embed(tmp_path / "in order", open_parts(), SimpleNamespace(shuffle=lambda items: None))
    assert {record.files for record in made} == {r.files for r in in_order if r.metrics.get("joined")}
    assert whole.folder.names() == Folder.at(tmp_path / "items").names()
    for record in expected:
        assert read_part(Folder.at(tmp_path / "items"), record.files[0].name).equals(
            read_part(whole.folder, record.files[0].name), check_metadata=True
        )
        name = hashes_name(record.files[0].name)
        assert (tmp_path / "items" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(PartRecords(Folder.at(tmp_path / "items"), "source").read_all()) == [
        f"part-{number:05d}" for number in range(3)
    ]


@pytest.mark.parametrize("num_done", [0, 1, 3, 4, 5, 9, 12])
def test_items_that_are_done_are_not_done_again(tmp_path: Path, num_done: int) -> None:
    records = PartRecords(Folder.at(tmp_path), "source")
    items = list(open_parts())
    for item in random.Random(num_done).sample(items, num_done):
        write(records, item)
    pending = open_parts(records.read_all())
    assert len(pending) == 12 - num_done == len(list(pending))
    found = embed(tmp_path, pending, random.Random(0))
    assert len(found) == 12 - num_done + 3
    assert [name for name in records.folder.names() if name.endswith(".parquet")] == [
        f"part-{number:05d}.parquet" for number in range(3)
    ]


def test_the_index_is_told_before_the_files_of_the_items_are_gone(tmp_path: Path) -> None:
    records = PartRecords(Folder.at(tmp_path), "source")
    part = OpenPart(plan_parts(8, 8)[0], WorkItems(plan_parts(8, 8)[0], SIZE))
    found = [write(records, item) for item in part.items]

    class Index(NoIndex):
        def finish(self, *values: Any) -> None:
            super().finish(*values)
            assert records.folder.exists("item-00001.parquet")

    index = Index()
    join(records, part, found, index)
    assert index.told[0][0] == "part-00000.parquet"
    assert not records.folder.exists("item-00001.parquet")


def test_a_part_that_is_tried_again_keeps_what_it_had_and_gets_what_is_new(tmp_path: Path) -> None:
    records = PartRecords(Folder.at(tmp_path), "source")
    part = plan_parts(45, 32)[0]
    earlier = write(records, part)
    again = PartRange(0, 0, 32, revision=1)
    items = WorkItems(again, SIZE).with_images([3, 21, 22])
    assert [(item.name, item.start, item.stop, item.only) for item in items] == [
        ("item-00000.r1", 0, 4, (3,)),
        ("item-00005.r1", 20, 24, (21, 22)),
    ]
    pending = OpenParts([OpenPart(again, items, earlier)], {})
    bad = {21: "missing"}
    written = (write(records, item, bad) for item in pending)
    *_, record = joined(written, pending, lambda *whole: join(records, *whole))
    assert record.name == "part-00000.r1"
    assert record.metrics["errors"] == [(21, "missing")]
    table = read_part(records.folder, "part-00000.r1.parquet")
    assert table.equals(table_of([i for i in range(32) if i != 21]))
    assert records.folder.exists("part-00000.parquet")


def test_a_part_whose_images_all_failed_again_keeps_its_file(tmp_path: Path) -> None:
    records = PartRecords(Folder.at(tmp_path), "source")
    earlier = write(records, plan_parts(45, 32)[0])
    again = PartRange(0, 0, 32, revision=1)
    pending = OpenParts([OpenPart(again, WorkItems(again, SIZE).with_images([3, 21]), earlier)], {})
    *_, record = joined((write(records, i) for i in pending), pending, lambda *whole: join(records, *whole))
    assert record.files == earlier.files
    assert records.folder.names() == ["part-00000.hashes", "part-00000.parquet"]


def test_a_damaged_item_is_not_joined(tmp_path: Path) -> None:
    records = PartRecords(Folder.at(tmp_path), "source")
    part = OpenPart(plan_parts(8, 8)[0], WorkItems(plan_parts(8, 8)[0], SIZE))
    found = [write(records, item) for item in part.items]
    (tmp_path / "item-00001.parquet").write_bytes(b"?")
    with pytest.raises(DamagedArtifactError, match="item-00001"):
        join(records, part, found)
    assert not records.folder.exists("part-00000.parquet")


def test_an_item_that_can_be_read_but_has_other_bytes_is_not_joined(tmp_path: Path) -> None:
    records = PartRecords(Folder.at(tmp_path), "source")
    part = OpenPart(plan_parts(8, 8)[0], WorkItems(plan_parts(8, 8)[0], SIZE))
    found = [write(records, item) for item in part.items]
    path = tmp_path / "item-00001.parquet"
    path.write_bytes(path.read_bytes().replace(b"parquet-cpp-arrow", b"parquet-cpp-arroW"))
    assert read_part(records.folder, path.name).num_rows == 4
    with pytest.raises(DamagedArtifactError, match="item-00001"):
        join(records, part, found)


def test_a_join_whose_worker_died_at_its_end_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = PartRecords(Folder.at(tmp_path), "source")
    part = OpenPart(plan_parts(8, 8)[0], WorkItems(plan_parts(8, 8)[0], SIZE))
    found = [write(records, item) for item in part.items]
    index = NoIndex()
    expected = join(records, part, found, index)
    expected_told = [values.tolist() for values in index.told[0][1:]]
    assert expected_told[1] == list(range(7))
    found = [write(records, item) for item in part.items][:1] + found[1:]
    records.folder.remove("item-00001.parquet")
    index = NoIndex()
    assert join(records, part, found, index).files == expected.files
    ((file, keys, rows),) = index.told
    assert (file, keys.tolist(), rows.tolist()) == ("part-00000.parquet", *expected_told)
    assert records.folder.names() == ["part-00000.hashes", "part-00000.parquet"]


def test_what_killed_runs_left_of_items_is_removed(tmp_path: Path) -> None:
    records = PartRecords(Folder.at(tmp_path), "source")
    write(records, next(iter(open_parts())))
    write(records, plan_parts(45, 16)[0])
    records.folder.write_bytes("item-00007.hashes", b"of an item that was killed before its file was there")
    remove_items(records.folder)
    assert records.folder.names() == ["part-00000.hashes", "part-00000.parquet"]
