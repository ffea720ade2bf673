from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray.assign import embeddings_to_label
from icce_ray.assign.embeddings_to_label import EmbeddedImages, EmbeddingFiles, Source
from icce_ray.config import EmbeddingsConfig
from icce_ray.embed.embedding_parts import part_table, plan_parts
from icce_ray.images.listing import Listing
from icce_ray.store import Artifact, ArtifactWriter, Folder

FEATURES = np.random.default_rng(0).normal(size=(53, 4)).astype(np.float16)


def artifact(writer: ArtifactWriter, stage: str) -> Artifact:
    return writer.commit(stage=stage, fingerprint="f", inputs={}, config={}, metrics={}, seconds=0)


def embedded(folder: Path) -> EmbeddedImages:
    """Images 0..52, of which 5 and 20 to 29 failed."""
    images, embed = ArtifactWriter(Folder.at(folder / "images")), ArtifactWriter(Folder.at(folder / "embed"))
    images.write_table("images.parquet", pa.table({"image_id": range(53), "uri": [f"/{i}.png" for i in range(53)]}))
    for part in plan_parts(53, 10):
        ids = np.array([i for i in range(part.start, part.stop) if i != 5 and not 20 <= i < 30], dtype=np.int64)
        embed.write_table(part.file_name, part_table(ids, FEATURES[ids]))
    return EmbeddedImages(artifact(embed, "embed"), artifact(images, "images"))


def write_parquet(path: Path, features: npt.NDArray[np.float16], row_group_size: int, **columns: list[str]) -> None:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
    pq.write_table(pa.table({"vector": lists, **columns}), path, row_group_size=row_group_size)


@pytest.fixture(params=[1, 10, 25, 1000])
def rows_per_part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(embeddings_to_label, "_rows_per_part", lambda num_rows: request.param)
    rows: int = request.param
    return rows


def read_all(source: Source) -> tuple[list[int], npt.NDArray[np.float16], list[str]]:
    """As workers read it: from pickles, the last part first."""
    parts = source.plan()
    assert [part.first_row for part in parts] == np.cumsum([0, *(part.num_rows for part in parts)])[:-1].tolist()
    rows: list[tuple[int, npt.NDArray[np.float16], str]] = []
    for part in reversed(parts):
        before = len(rows)
        for ids, features, uris, _ in pickle.loads(pickle.dumps(source)).read(part):
            rows += zip(ids.tolist(), features, uris.to_pylist(), strict=True)
        assert len(rows) - before == part.num_rows
    rows.sort(key=lambda row: row[0])
    return [i for i, _, _ in rows], np.array([x for _, x, _ in rows]), [uri for _, _, uri in rows]


def test_each_embedded_image_is_read_once_however_the_parts_are_cut(tmp_path: Path, rows_per_part: int) -> None:
    source = embedded(tmp_path)
    assert [part.num_rows for part in source.plan()] == {
        1: [9, 10, 10, 10, 3],
        10: [9, 10, 10, 10, 3],
        25: [19, 23],
        1000: [42],
    }[rows_per_part]
    ids, features, uris = read_all(source)
    assert ids == [i for i in range(53) if i != 5 and not 20 <= i < 30]
    np.testing.assert_array_equal(features, FEATURES[ids])
    assert uris == [f"/{i}.png" for i in ids]


def test_rows_of_parquet_files_are_read_once_where_they_lie(tmp_path: Path, rows_per_part: int) -> None:
    write_parquet(tmp_path / "a.parquet", FEATURES[:30], 7)
    write_parquet(tmp_path / "b.parquet", FEATURES[30:], 100, uri=[f"/b/{i}.png" for i in range(23)])
    source = EmbeddingFiles(EmbeddingsConfig(uri=str(tmp_path)), "uri")
    ids, features, uris = read_all(source)
    assert ids == list(range(53))
    np.testing.assert_array_equal(features, FEATURES)
    assert uris == [f"{tmp_path}/a.parquet#{i}" for i in range(30)] + [f"/b/{i}.png" for i in range(23)]
    sizes = [part.num_rows for part in source.plan()]
    assert sizes == {1: [7, 7, 7, 7, 2, 23], 10: [7, 7, 7, 9, 23], 25: [21, 9, 23], 1000: [30, 23]}[rows_per_part]


def test_rows_of_an_npy_file_are_read_once(tmp_path: Path) -> None:
    features = np.random.default_rng(1).normal(size=(70_001, 2)).astype(np.float16)
    np.save(tmp_path / "x.npy", features)
    source = EmbeddingFiles(EmbeddingsConfig(uri=str(tmp_path / "x.npy")), "uri")
    assert [part.num_rows for part in source.plan()] == [32_768, 32_768, 4_465]
    ids, read, uris = read_all(source)
    assert ids == list(range(70_001))
    np.testing.assert_array_equal(read, features)
    assert uris[70_000] == f"{tmp_path}/x.npy#70000"


@pytest.mark.parametrize(
    ("num_rows", "rows_per_part"), [(40, 32_768), (10**6, 32_768), (2 * 10**6, 62_500), (10**9, 131_072)]
)
def test_there_are_32_parts_of_bounded_size(num_rows: int, rows_per_part: int) -> None:
    assert embeddings_to_label._rows_per_part(num_rows) == rows_per_part


def test_the_identity_changes_with_the_file_and_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, FEATURES, 20)

    def identity(uri_column: str = "uri") -> str:
        return json.dumps(EmbeddingFiles(EmbeddingsConfig(uri=str(path)), uri_column).identity())

    first = identity()
    assert identity() == first
    assert identity("url") != first
    write_parquet(path, FEATURES + 1, 20)
    assert identity() != first


def test_the_identity_changes_with_the_embeddings_and_the_listing(tmp_path: Path) -> None:
    source = embedded(tmp_path / "a")
    first, uris = source.identity(), ["/other.png"] * 53
    assert embedded(tmp_path / "b").identity() == first
    writer = ArtifactWriter(Folder.at(tmp_path / "images"))
    writer.write_table("images.parquet", pa.table({"image_id": range(53), "uri": uris}))
    assert EmbeddedImages(source.embed, artifact(writer, "images")).identity() != first
    writer = ArtifactWriter(Folder.at(tmp_path / "embed"))
    writer.write_table("part-00000.parquet", pa.table({"image_id": range(53)}))
    assert EmbeddedImages(artifact(writer, "embed"), source.images).identity() != first


def test_a_row_that_is_not_finite_is_an_error_with_its_place(tmp_path: Path, rows_per_part: int) -> None:
    features = FEATURES.copy()
    features[[0, 31, 32], 2] = np.nan
    write_parquet(tmp_path / "a.parquet", features[:30], 10)
    write_parquet(tmp_path / "b.parquet", features[30:], 10)
    source = EmbeddingFiles(EmbeddingsConfig(uri=str(tmp_path)), "uri")
    blocks = [rows for part in source.plan() for rows in source.read(part)]
    ids = np.concatenate([rows.image_ids for rows in blocks])
    assert ids.tolist() == [i for i in range(53) if i not in (0, 31, 32)]
    np.testing.assert_array_equal(np.concatenate([rows.features_nD for rows in blocks]), FEATURES[ids])
    uris = [uri for rows in blocks for uri in rows.uris.to_pylist()]
    assert uris[:1] + uris[29:31] == [f"{tmp_path}/a.parquet#1", f"{tmp_path}/b.parquet#0", f"{tmp_path}/b.parquet#3"]
    errors = pa.concat_tables([rows.errors for rows in blocks if rows.errors is not None])
    assert errors["image_id"].to_pylist() == [0, 31, 32]
    assert errors["uri"].to_pylist() == [f"{tmp_path}/a.parquet#0", *(f"{tmp_path}/b.parquet#{i}" for i in (1, 2))]
    assert errors["reason"].to_pylist() == ["NaN, null or infinite values, as float16"] * 3


def test_uris_are_found_across_parts(tmp_path: Path) -> None:
    writer = ArtifactWriter(Folder.at(tmp_path))
    uris = [f"/images/{number}.png" for number in range(25)]
    for number, start in enumerate(range(0, 25, 7)):
        stop = min(start + 7, 25)
        table = pa.table({"image_id": range(start, stop), "uri": uris[start:stop]})
        writer.write_table(f"images-{number}.parquet", table)
    listing = Listing(artifact(writer, "images"))
    for ids in ([0], [6, 7], [3, 9, 22, 24], [14, 15], []):
        assert listing.uris(np.array(ids, dtype=np.int64)).to_pylist() == [uris[i] for i in ids]
