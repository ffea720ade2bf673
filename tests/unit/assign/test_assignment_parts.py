from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from icce_ray.assign.assignment_parts import (
    AssignPart,
    FinishedPart,
    Tally,
    begin_try,
    finish_part,
    note_name,
    tries_name,
)
from icce_ray.assign.sources import EmbeddedImages
from icce_ray.errors import WorkerError
from icce_ray.store import Artifact, ArtifactWriter, Folder, Part


def artifact(writer: ArtifactWriter) -> Artifact:
    return writer.commit(stage="x", fingerprint="f", inputs={}, config={}, metrics={}, seconds=0)


def embedded(folder: Path, rows: list[int]) -> Artifact:
    writer = ArtifactWriter(Folder.at(folder))
    for index, num_rows in enumerate(rows):
        writer.add(Part(name=f"part-{index:05d}.parquet", num_bytes=1, sha256=f"{index}", rows=num_rows))
    writer.add(Part(name="errors.parquet", num_bytes=1, sha256="e", rows=3))
    return artifact(writer)


def images(folder: Path) -> Artifact:
    writer = ArtifactWriter(Folder.at(folder))
    writer.add(Part(name="images.parquet", num_bytes=1, sha256="i", rows=3))
    return artifact(writer)


def plan_parts(tmp_path: Path, rows: list[int], limit: int, made_from: str = "a") -> list[AssignPart]:
    return EmbeddedImages(embedded(tmp_path / "e", rows), images(tmp_path / "i")).plan(limit, [made_from])


def test_parts_join_consecutive_inputs_up_to_the_limit_and_cover_each_row_once(tmp_path: Path) -> None:
    parts = plan_parts(tmp_path, [40, 40, 40, 500, 10, 0, 30], 100)
    assert [part.num_rows for part in parts] == [80, 40, 500, 40]
    assert [part.first_row for part in parts] == [0, 80, 120, 620]
    assert [name for part in parts for name in part.inputs] == [f"part-{i:05d}.parquet" for i in range(7)]


def test_what_a_part_is_made_from_decides_whether_it_is_taken_up(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "assign")
    (one, two), (other, _) = (plan_parts(tmp_path, [40, 40], 40, source) for source in ("model 1", "model 2"))
    assert FinishedPart.find(folder, one) is None
    table = pa.table({"image_id": [1, 2]})
    finished = finish_part(one, folder, table, Tally(num_images=2), ("beside.parquet", table))
    assert FinishedPart.find(folder, one) == finished
    assert FinishedPart.find(folder, other) is None
    assert FinishedPart.find(folder, two) is None
    folder.write_bytes("beside.parquet", b"cut off")
    assert FinishedPart.find(folder, one) is None
    finish_part(one, folder, table, Tally(num_images=2), ("beside.parquet", table))
    folder.write_bytes(one.name, b"cut off")
    assert FinishedPart.find(folder, one) is None


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"source": "s"}', b'{"source": "s", "part": {}, "tally": {}}'])
def test_a_note_that_is_not_whole_counts_for_nothing(tmp_path: Path, note: bytes) -> None:
    folder = Folder.at(tmp_path)
    wanted = AssignPart("part-00000.parquet", (), 0, 0, "s")
    folder.write_bytes(note_name(wanted), note)
    assert FinishedPart.find(folder, wanted) is None


def test_a_part_may_be_begun_so_often_in_one_run_and_afresh_in_the_next(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    wanted = AssignPart("assignments/part-00000.parquet", (), 0, 1234, "s")
    for _ in range(3):
        begin_try(wanted, folder, "first run", max_tries=3)
    with pytest.raises(WorkerError, match="1,234 images killed their process 3 times"):
        begin_try(wanted, folder, "first run", max_tries=3)
    begin_try(wanted, folder, "second run", max_tries=3)
    folder.write_bytes(tries_name(wanted), b"{")
    begin_try(wanted, folder, "second run", max_tries=1)


def test_tallies_add_up() -> None:
    one = Tally(3, 2, 1, 1, 1.5, cluster_sizes={"0": 1, "4": 2})
    total = one + Tally(1, 0, 0, 0, 0.5, cluster_sizes={"4": 1}) + Tally()
    assert total.metrics(6) == {
        "num_images": 4,
        "num_in_consensus": 2,
        "num_outliers": 1,
        "num_exemplars": 1,
        "mean_confidence": 0.5,
        "num_clusters_used": 2,
        "cluster_sizes": [1, 0, 0, 0, 3, 0],
    }
