"""Progress of the stage: finished parts, and how far the others are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from icce_ray.embed.embedding_parts import PartRange, part_table, write_part
from icce_ray.embed.finished_parts import Tally
from icce_ray.embed.work_items import WorkItems
from icce_ray.stage import StageContext
from icce_ray.store import ArtifactWriter, Folder, PartRecords


def test_images_count_while_their_part_is_unfinished_and_once_when_it_is(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    shown: list[int] = []
    progress: Any = SimpleNamespace(update=lambda done, total, num_errors: shown.append(done))
    listing: Any = range(20)
    tally = Tally(StageContext(ArtifactWriter(folder), {}, progress), listing, max_error_rate=1.0)
    parts = [PartRange(index, 10 * index, 10 * index + 10) for index in range(2)]
    for num_unfinished in (4, 7, 11):
        tally.show(num_unfinished)
    table = part_table(np.arange(10), np.zeros((10, 2), dtype=np.float16))
    tally.add(write_part(PartRecords(folder, "source"), parts[0], table))
    tally.show(1)  # a worker died, and another began again
    tally.show(5)
    tally.show(12)  # of a part that has been finished since
    assert shown == [4, 7, 11, 11, 11, 15, 20]


def test_images_whose_range_is_a_guess_are_counted_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    progress: Any = SimpleNamespace(update=lambda done, total, num_errors: None, note=said.append)
    listing: Any = range(20)
    tally = Tally(StageContext(ArtifactWriter(Folder.at(tmp_path)), {}, progress), listing, max_error_rate=1.0)
    table = part_table(np.arange(10), np.zeros((10, 2), dtype=np.float16))
    for index in range(2):
        part = PartRange(index, 10 * index, 10 * index + 10)
        tally.add(write_part(PartRecords(Folder.at(tmp_path), "source"), part, table, num_stretched=3))
    assert tally.finish("pixels", has_hashes=False)["num_stretched"] == 6
    assert said == ["6 grey images of more than 8 bits: each is stretched from minimum to maximum"]


def test_images_count_with_their_items_and_not_again_when_these_are_joined(tmp_path: Path) -> None:
    shown: list[int] = []
    progress: Any = SimpleNamespace(update=lambda done, total, num_errors: shown.append(done))
    records = PartRecords(Folder.at(tmp_path), "source")
    context = StageContext(ArtifactWriter(records.folder), {}, progress)
    listing: Any = range(20)
    tally = Tally(context, listing, max_error_rate=1.0)
    part = PartRange(0, 0, 20)
    table = part_table(np.arange(10), np.zeros((10, 2), dtype=np.float16))
    items = [write_part(records, item, table, num_embedded=10) for item in WorkItems(part, 10)]
    tally.add_earlier(items[0])
    tally.add(items[1])
    tally.add(write_part(records, part, table, num_embedded=20, joined=True))
    assert shown == [10, 20]
    assert list(context.output.parts) == ["part-00000.parquet"]
    assert tally.finish("pixels", has_hashes=False)["num_embedded"] == 20
    resumed = Tally(StageContext(ArtifactWriter(records.folder), {}, progress), listing, max_error_rate=1.0)
    assert resumed.resume([part], records)[0] == []
    assert resumed.finish("pixels", has_hashes=False)["num_embedded"] == 20
