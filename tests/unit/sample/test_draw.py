from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.sample import draw
from icce_ray.sample.draw import plan_parts, sample_rows, sampled_ids, spread, training_set, write_part
from icce_ray.store import Artifact, ArtifactWriter, Folder

COMMIT = {"fingerprint": "f", "inputs": {}, "config": {}, "metrics": {}, "seconds": 0.0}


def make_embeddings(folder: Path, part_sizes: list[int]) -> Artifact:
    """Image ids are the even numbers; an embedding is its id."""
    writer, first = ArtifactWriter(Folder.at(folder)), 0
    for number, size in enumerate(part_sizes):
        ids = 2 * np.arange(first, first + size)
        column = pa.FixedSizeListArray.from_arrays(pa.array(ids.astype(np.float32)), 1)
        writer.write_table(f"part-{number:05d}.parquet", pa.table({"image_id": ids, "embedding": column}))
        first += size
    return writer.commit(stage="embed", **COMMIT)


def make_sample(folder: Path, embed: Artifact, rows: np.ndarray | None) -> Artifact:
    writer = ArtifactWriter(Folder.at(folder))
    for part in plan_parts(embed, rows) if rows is not None else []:
        write_part(part, embed, writer)
    return writer.commit(stage="sample", **COMMIT)


def test_few_images_all_take_part() -> None:
    assert sample_rows(100, 100, 0) is None
    assert sample_rows(100, None, 0) is None


def test_the_sample_is_seeded_uniform_and_without_repeats() -> None:
    counts = np.zeros(50)
    for seed in range(400):
        rows = sample_rows(50, 20, seed)
        assert rows is not None
        assert len(rows) == len(np.unique(rows)) == 20
        assert (np.diff(rows) > 0).all()
        counts[rows] += 1
    assert counts.min() > 110  # 160 expected, deviation 10
    assert counts.max() < 210
    assert np.array_equal(sample_rows(50, 20, 3), sample_rows(50, 20, 3))


@pytest.mark.parametrize("min_rows", [1, 8, 1000])
def test_the_parts_hold_the_drawn_rows_in_order(tmp_path: Path, min_rows: int, monkeypatch) -> None:
    monkeypatch.setattr(draw, "MIN_ROWS_PER_PART", min_rows)
    embed = make_embeddings(tmp_path / "embed", [10, 3, 0, 12, 1])
    rows = np.array([0, 9, 10, 14, 15, 22, 25])
    inputs = {"embed": embed, "sample": make_sample(tmp_path / "sample", embed, rows)}
    chosen = training_set(inputs)
    table = pa.concat_tables([chosen.read_table(name) for name in chosen.part_names("part-")])
    assert table["image_id"].to_pylist() == (2 * rows).tolist()
    assert [value[0] for value in table["embedding"].to_pylist()] == (2 * rows).tolist()
    assert table.schema == embed.read_table("part-00000.parquet").schema
    assert np.array_equal(sampled_ids(inputs), 2 * rows)


def test_rows_at_the_very_end_are_not_forgotten(tmp_path: Path) -> None:
    embed = make_embeddings(tmp_path / "embed", [4, 4, 4])
    inputs = {"embed": embed, "sample": make_sample(tmp_path / "sample", embed, np.array([1, 2]))}
    assert sampled_ids(inputs).tolist() == [2, 4]


def test_without_a_sample_training_sees_everything(tmp_path: Path) -> None:
    embed = make_embeddings(tmp_path / "embed", [4])
    inputs = {"embed": embed, "sample": make_sample(tmp_path / "sample", embed, None)}
    assert training_set(inputs) is embed
    assert sampled_ids(inputs) is None


def test_values_are_spread_over_all_images() -> None:
    values = spread(np.array([7, 8], dtype=np.int32), np.array([2, 6]), np.array([0, 2, 4, 6, 9]), -1)
    assert values.tolist() == [-1, 7, -1, 8, -1]
    assert values.dtype == np.int32
