from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.config import SampleConfig
from icce_ray.random_numbers import id_hashes
from icce_ray.sample import training_set as module
from icce_ray.sample.near_duplicates import group_table
from icce_ray.sample.training_set import (
    GROUPS_NAME,
    IMAGE_IDS_NAME,
    choose_rows,
    plan_parts,
    sample_ids,
    training_rows,
    training_set,
    write_part,
)
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


def make_sample(folder: Path, embed: Artifact, rows: np.ndarray | None, groups: pa.Table | None = None) -> Artifact:
    writer = ArtifactWriter(Folder.at(folder))
    for part in plan_parts(embed, rows) if rows is not None else []:
        write_part(part, embed, writer)
    if rows is not None:
        writer.write_array(IMAGE_IDS_NAME, 2 * rows)
    if groups is not None:
        writer.write_table(GROUPS_NAME, groups)
    return writer.commit(stage="sample", **COMMIT)


def test_few_images_all_take_part() -> None:
    assert sample_ids(100, 100, 0) is None
    assert sample_ids(100, None, 0) is None


def test_the_sample_is_seeded_uniform_and_without_repeats() -> None:
    counts = np.zeros(50)
    for seed in range(400):
        rows = sample_ids(50, 20, seed)
        assert rows is not None
        assert len(rows) == len(np.unique(rows)) == 20
        assert (np.diff(rows) > 0).all()
        counts[rows] += 1
    assert counts.min() > 110  # 160 expected, deviation 10
    assert counts.max() < 210
    assert np.array_equal(sample_ids(50, 20, 3), sample_ids(50, 20, 3))


def test_a_new_image_takes_the_place_of_at_most_one_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDS_PER_BLOCK", 64)
    before = sample_ids(300, 100, 7)
    assert before is not None
    num_new = 0
    for num_images in range(301, 400):
        drawn = sample_ids(num_images, 100, 7)
        assert drawn is not None
        assert len(set(drawn) - set(before)) <= 1
        num_new += drawn.tolist() != before.tolist()
        before = drawn
    assert 10 < num_new < 50  # 29 expected


@pytest.mark.parametrize("block", [7, 50, 1000])
def test_failed_images_are_not_drawn_and_do_not_change_the_others(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDS_PER_BLOCK", block)
    failed = np.sort(np.random.default_rng(0).choice(200, 60, replace=False))
    order = np.argsort(id_hashes(np.arange(200), 3))
    expected = [image_id for image_id in order if image_id not in failed][:40]
    drawn = sample_ids(140, 40, 3, failed)
    assert drawn is not None
    assert drawn.tolist() == sorted(expected)


@pytest.mark.parametrize("min_rows", [1, 8, 1000])
def test_the_parts_hold_the_chosen_rows_in_order(tmp_path: Path, min_rows: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "MIN_ROWS_PER_PART", min_rows)
    embed = make_embeddings(tmp_path / "embed", [10, 3, 0, 12, 1])
    rows = np.array([0, 9, 10, 14, 15, 22, 25])
    inputs = {"embed": embed, "sample": make_sample(tmp_path / "sample", embed, rows)}
    chosen = training_set(inputs)
    table = pa.concat_tables([chosen.read_table(name) for name in chosen.part_names("part-")])
    assert table["image_id"].to_pylist() == (2 * rows).tolist()
    assert [value[0] for value in table["embedding"].to_pylist()] == (2 * rows).tolist()
    assert table.schema == embed.read_table("part-00000.parquet").schema
    training = training_rows(inputs)
    assert training is not None
    assert np.array_equal(training.image_ids_n, 2 * rows)
    assert training.rows_of(np.array([0, 2, 18, 50, 51])).tolist() == [0, -1, 1, 6, -1]


def test_rows_at_the_very_end_are_not_forgotten(tmp_path: Path) -> None:
    embed = make_embeddings(tmp_path / "embed", [4, 4, 4])
    inputs = {"embed": embed, "sample": make_sample(tmp_path / "sample", embed, np.array([1, 2]))}
    training = training_rows(inputs)
    assert training is not None
    assert training.image_ids_n.tolist() == [2, 4]


def test_without_parts_training_sees_everything(tmp_path: Path) -> None:
    embed = make_embeddings(tmp_path / "embed", [4])
    inputs = {"embed": embed, "sample": make_sample(tmp_path / "sample", embed, None)}
    assert training_set(inputs) is embed
    assert training_rows(inputs) is None


def test_a_near_duplicate_is_represented_by_the_row_of_its_leader(tmp_path: Path) -> None:
    embed = make_embeddings(tmp_path / "embed", [8])
    # Rows 2 and 7 follow row 1, row 5 follows row 4; the ids are twice the rows.
    groups = group_table(np.array([0, 1, 1, 3, 4, 4, 6, 1]), 2 * np.arange(8))
    sample = make_sample(tmp_path / "sample", embed, np.array([0, 1, 3, 4, 6]), groups)
    training = training_rows({"embed": embed, "sample": sample})
    assert training is not None
    assert training.image_ids_n.tolist() == [0, 2, 6, 8, 12]
    assert training.rows_of(np.arange(0, 18, 2)).tolist() == [0, 1, 1, 2, 3, 3, 4, 1, -1]


def test_in_process_near_duplicates_are_looked_for_among_the_drawn_rows() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((120, 16)).astype(np.float32)
    features[60:] = features[:60]
    assert choose_rows(features, SampleConfig(duplicate_threshold=None), seed=0) is None
    assert choose_rows(features[:60], SampleConfig(), seed=0) is None
    whole = choose_rows(features, SampleConfig(), seed=0)
    assert whole is not None
    assert whole.image_ids_n.tolist() == list(range(60))
    assert whole.rows_of(np.arange(120)).tolist() == 2 * list(range(60))
    drawn = sample_ids(120, 90, 5)
    assert drawn is not None
    plain = choose_rows(features, SampleConfig(max_images=90, duplicate_threshold=None), seed=5)
    assert plain is not None
    assert np.array_equal(plain.image_ids_n, drawn)
    assert len(plain.follower_ids_F) == 0
    both = choose_rows(features, SampleConfig(max_images=90), seed=5)
    assert both is not None
    followers = [row for row in drawn if row >= 60 and row - 60 in drawn]
    assert 20 < len(followers) < 60
    assert both.follower_ids_F.tolist() == followers
    assert both.leader_ids_F.tolist() == [row - 60 for row in followers]
    assert both.image_ids_n.tolist() == [row for row in drawn if row not in followers]
