from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray.assign.sources import EmbeddedImages, EmbeddingFiles, Source, UriReader
from icce_ray.config import EmbeddingsConfig
from icce_ray.embed import embedding_parts as embed_parts
from icce_ray.errors import InputError
from icce_ray.store import Artifact, ArtifactWriter, Folder

FEATURES = np.random.default_rng(0).normal(size=(53, 4)).astype(np.float16)


def artifact(writer: ArtifactWriter, stage: str) -> Artifact:
    return writer.commit(stage=stage, fingerprint="f", inputs={}, config={}, metrics={}, seconds=0)


def embedded(folder: Path) -> EmbeddedImages:
    """Images 0..52, of which 5 and 20 to 29 failed."""
    images, embed = ArtifactWriter(Folder.at(folder / "images")), ArtifactWriter(Folder.at(folder / "embed"))
    images.write_table("images.parquet", pa.table({"image_id": range(53), "uri": [f"/{i}.png" for i in range(53)]}))
    for part in embed_parts.plan_parts(53, 10):
        ids = np.array([i for i in range(part.start, part.stop) if i != 5 and not 20 <= i < 30], dtype=np.int64)
        table = embed_parts.part_table(part, ids, FEATURES[ids])
        embed.add(embed_parts.write_part(embed.folder, part, table).part)
    return EmbeddedImages(artifact(embed, "embed"), artifact(images, "images"))


def write_parquet(path: Path, features: npt.NDArray[np.float16], row_group_size: int, **columns: list[str]) -> None:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
    pq.write_table(pa.table({"vector": lists, **columns}), path, row_group_size=row_group_size)


def read_all(source: Source, rows_per_part: int) -> tuple[list[int], npt.NDArray[np.float16], list[str]]:
    """As workers read it: from pickles, the last part first."""
    parts = source.plan(rows_per_part, ["test"])
    assert [part.first_row for part in parts] == np.cumsum([0, *(part.num_rows for part in parts)])[:-1].tolist()
    rows: list[tuple[int, npt.NDArray[np.float16], str]] = []
    for part in reversed(parts):
        before = len(rows)
        for ids, features, uris in pickle.loads(pickle.dumps(source)).read(part):
            rows += zip(ids.tolist(), features, uris.to_pylist(), strict=True)
        assert len(rows) - before == part.num_rows
    rows.sort(key=lambda row: row[0])
    return [i for i, _, _ in rows], np.array([x for _, x, _ in rows]), [uri for _, _, uri in rows]


@pytest.mark.parametrize("rows_per_part", [1, 10, 25, 1000])
def test_each_embedded_image_is_read_once_however_the_parts_are_cut(tmp_path: Path, rows_per_part: int) -> None:
    ids, features, uris = read_all(embedded(tmp_path), rows_per_part)
    assert ids == [i for i in range(53) if i != 5 and not 20 <= i < 30]
    np.testing.assert_array_equal(features, FEATURES[ids])
    assert uris == [f"/{i}.png" for i in ids]


@pytest.mark.parametrize("rows_per_part", [1, 10, 25, 1000])
def test_rows_of_parquet_files_are_read_once_where_they_lie(tmp_path: Path, rows_per_part: int) -> None:
    write_parquet(tmp_path / "a.parquet", FEATURES[:30], 7)
    write_parquet(tmp_path / "b.parquet", FEATURES[30:], 100, uri=[f"/b/{i}.png" for i in range(23)])
    source = EmbeddingFiles(EmbeddingsConfig(uri=str(tmp_path)), "uri")
    ids, features, uris = read_all(source, rows_per_part)
    assert ids == list(range(53))
    np.testing.assert_array_equal(features, FEATURES)
    assert uris == [f"{tmp_path}/a.parquet#{i}" for i in range(30)] + [f"/b/{i}.png" for i in range(23)]
    sizes = [part.num_rows for part in source.plan(rows_per_part, [])]
    assert sizes == {1: [7, 7, 7, 7, 2, 23], 10: [7, 7, 7, 9, 23], 25: [21, 9, 23], 1000: [30, 23]}[rows_per_part]


@pytest.mark.parametrize("rows_per_part", [9000, 20_000, 10**6])
def test_rows_of_an_npy_file_are_read_once(tmp_path: Path, rows_per_part: int) -> None:
    features = np.random.default_rng(1).normal(size=(30_001, 2)).astype(np.float16)
    np.save(tmp_path / "x.npy", features)
    ids, read, uris = read_all(EmbeddingFiles(EmbeddingsConfig(uri=str(tmp_path / "x.npy")), "uri"), rows_per_part)
    assert ids == list(range(30_001))
    np.testing.assert_array_equal(read, features)
    assert uris[30_000] == f"{tmp_path}/x.npy#30000"


def test_a_part_is_another_when_its_file_or_what_it_is_made_from_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, FEATURES, 20)

    def digests(made_from: str) -> set[str]:
        source = EmbeddingFiles(EmbeddingsConfig(uri=str(path)), "uri")
        return {part.source for part in source.plan(20, [made_from])}

    first = digests("model 1")
    assert len(first) == 3
    assert digests("model 1") == first
    assert not digests("model 2") & first
    write_parquet(path, FEATURES + 1, 20)
    assert not digests("model 1") & first


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    features = FEATURES.copy()
    features[31, 2] = np.nan
    write_parquet(tmp_path / "a.parquet", features, 10)
    with pytest.raises(InputError, match=r"a\.parquet, row 31: NaN"):
        read_all(EmbeddingFiles(EmbeddingsConfig(uri=str(tmp_path)), "uri"), 20)


def test_uris_are_found_across_row_groups(tmp_path: Path) -> None:
    writer = ArtifactWriter(Folder.at(tmp_path))
    uris = [f"/images/{number}.png" for number in range(25)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image_id": range(25), "uri": uris}), sink, row_group_size=7)
    writer.write_bytes("images.parquet", sink.getvalue().to_pybytes(), rows=25)
    reader = UriReader(artifact(writer, "images"))
    for ids in ([0], [6, 7], [3, 9, 22, 24], [14, 15], []):
        assert reader.read(np.array(ids, dtype=np.int64)).to_pylist() == [uris[i] for i in ids]
