from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.embed.embedding_parts import part_table, plan_parts, write_part
from icce_ray.embed.feature_matrix import Draw, read_rows
from icce_ray.embed.part_hashes import sampled_name
from icce_ray.random_numbers import id_hashes
from icce_ray.sample import training_set
from icce_ray.store import Artifact, ArtifactWriter, Folder, PartRecords

NUM_IMAGES, SEED = 1000, 3


def make_embeddings(folder: Path, draw: Draw | None) -> Artifact:
    """Four parts, in which every seventh image has failed."""
    writer, records = ArtifactWriter(Folder.at(folder)), PartRecords(Folder.at(folder), "")
    for part in plan_parts(NUM_IMAGES, 250):
        ids = np.arange(part.start, part.stop)
        ids = ids[ids % 7 != 0]
        hashes = pa.array([f"{image_id:064x}" for image_id in ids])
        table = part_table(ids, np.float16(ids)[:, None] * np.ones(8, np.float16), hashes, (5, 3), model="m")
        writer.add(write_part(records, part, table, draw=draw).files[0])
    return writer.commit(stage="embed", fingerprint="f", inputs={}, config={}, metrics={}, seconds=0.0)


def files_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    read = Folder.read_bytes

    def spy(folder: Folder, name: str, num_bytes: int | None = None) -> bytes:
        names.append(name)
        return read(folder, name, num_bytes)

    monkeypatch.setattr(Folder, "read_bytes", spy)
    return names


def drawn_rows(embed: Artifact, max_images: int) -> np.ndarray:
    failed = np.arange(0, NUM_IMAGES, 7)
    ids = training_set.sample_ids(NUM_IMAGES - len(failed), max_images, SEED, failed)
    assert ids is not None
    return ids - np.searchsorted(failed, ids)


@pytest.mark.parametrize(("max_images", "from_parts"), [(60, 0), (150, 4)])
def test_the_sample_has_the_same_bytes_with_the_files_beside_the_parts_and_does_not_read_the_parts(
    max_images: int, from_parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Draw.of(NUM_IMAGES, 60, SEED)
    digests = []
    for place, chosen in (("with", draw), ("without", None)):
        embed = make_embeddings(tmp_path / place, chosen)
        writer, names = ArtifactWriter(Folder.at(tmp_path / place / "sample")), files_read(monkeypatch)
        for part in training_set.plan_parts(embed, drawn_rows(embed, max_images)):
            training_set.write_part(part, embed, writer)
        digests.append([part.sha256 for part in writer.parts.values()])
        # 150 are more than the files were made for.
        assert sum(name.endswith(".parquet") for name in names if "parts-" not in name) == (from_parts if chosen else 4)
    assert digests[0] == digests[1]


def test_a_file_holds_the_rows_with_small_hashes(tmp_path: Path) -> None:
    draw = Draw.of(NUM_IMAGES, 60, SEED)
    assert draw is not None
    make_embeddings(tmp_path, draw)
    found = [pa.parquet.read_table(tmp_path / sampled_name(f"part-0000{number}.parquet")) for number in range(4)]
    ids = np.concatenate([table["image_id"].to_numpy() for table in found])
    expected = np.flatnonzero(id_hashes(np.arange(NUM_IMAGES), SEED) <= np.uint64(draw.limit))
    assert ids.tolist() == [image_id for image_id in expected.tolist() if image_id % 7]
    assert 60 < len(ids) < 180


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "of another part", "foreign"])
def test_a_file_that_cannot_be_used_is_replaced_by_the_part(tmp_path: Path, damage: str) -> None:
    embed = make_embeddings(tmp_path, Draw.of(NUM_IMAGES, 60, SEED))
    file = tmp_path / sampled_name("part-00001.parquet")
    rows = pa.parquet.read_table(file)["row"].to_numpy()
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        data[40] ^= 1
        file.write_bytes(data)
    elif damage == "of another part":
        file.write_bytes((tmp_path / sampled_name("part-00002.parquet")).read_bytes())
    else:
        pa.parquet.write_table(pa.table({"x": [1]}), file)
    expected = embed.read_table("part-00001.parquet").take(pa.array(rows))
    assert read_rows(embed, "part-00001.parquet", rows).equals(expected, check_metadata=True)


def test_nothing_is_drawn_ahead_if_all_images_or_most_are_trained_on() -> None:
    assert Draw.of(1000, None, 0) is None
    assert Draw.of(1000, 1000, 0) is None
    assert Draw.of(1000, 600, 0) is None
    assert Draw.of(0, 10, 0) is None
