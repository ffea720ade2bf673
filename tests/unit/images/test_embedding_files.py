from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from icce_ray.config import Config, EmbeddingsConfig
from icce_ray.errors import InputError
from icce_ray.images import embedding_files, list_images
from icce_ray.images.embedding_files import EmbeddingFile, NpyEmbeddings, ParquetEmbeddings, open_embeddings
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import ArtifactWriter, Folder

ROWS = np.random.default_rng(0).standard_normal((23, 4))


def open_file(path: Path, column: str | None = None) -> embedding_files.Embeddings:
    return open_embeddings(EmbeddingsConfig(uri=str(path), column=column))


def list_column(rows: np.ndarray, kind: str) -> pa.Array:
    value = pa.from_numpy_dtype(rows.dtype)
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    if kind == "tensor":
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(rows))
    return pa.array(list(rows), pa.list_(value) if kind == "list" else pa.large_list(value))


def check_blocks(embeddings: embedding_files.Embeddings, expected: np.ndarray) -> None:
    assert (embeddings.num_rows, embeddings.dim, embeddings.dtype) == (*expected.shape, expected.dtype)
    for num_rows in (1, 5, 23, 100):
        for start in (0, 1, 7, 22):
            blocks = list(embeddings.blocks(num_rows, start))
            assert all(len(block.rows_nD) == num_rows for block in blocks[:-1])
            assert all(block.rows_nD.dtype == expected.dtype and block.rows_nD.flags.c_contiguous for block in blocks)
            assert np.array_equal(np.concatenate([block.rows_nD for block in blocks]), expected[start:])
            assert all(block.is_usable_n.all() and not block.problems() for block in blocks)


@pytest.mark.parametrize(("stored", "kept"), [("f2", "f2"), ("f4", "f4"), ("f8", "f4"), (">f4", "f4")])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_npy_file_comes_back_in_blocks_from_any_row(tmp_path: Path, stored: str, kept: str, order: Any) -> None:
    np.save(tmp_path / "e.npy", np.asarray(ROWS, dtype=stored, order=order))
    check_blocks(open_file(tmp_path / "e.npy"), ROWS.astype(stored).astype(kept))


def test_a_remote_npy_file_is_read_by_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "e.npy", ROWS.astype(np.float16))
    remote = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(embedding_files, "open_uri", lambda uri: (remote, "e.npy"))
    check_blocks(open_embeddings(EmbeddingsConfig(uri="s3://bucket/e.npy")), ROWS.astype(np.float16))


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed", "tensor"])
@pytest.mark.parametrize(("stored", "kept"), [("f2", "f2"), ("f4", "f4"), ("f8", "f4")])
def test_a_parquet_list_column_comes_back_in_blocks_from_any_row(
    tmp_path: Path, kind: str, stored: str, kept: str
) -> None:
    rows = ROWS.astype(stored)
    table = pa.table({"name": [str(row) for row in range(23)], "vector": list_column(rows, kind)})
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=4)
    check_blocks(open_file(tmp_path / "e.parquet"), rows.astype(kept))


def test_a_folder_of_parquet_files_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    rows = ROWS.astype(np.float32)
    for name, start, stop in (("a", 0, 9), ("b", 9, 9), ("x/c", 9, 23), ("_tmp", 0, 5)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"e": list_column(rows[start:stop], "fixed")}), tmp_path / f"{name}.parquet")
    embeddings = open_file(tmp_path)
    check_blocks(embeddings, rows)
    assert embeddings.uris("uri").to_pylist()[8:10] == [f"{tmp_path}/a.parquet#8", f"{tmp_path}/x/c.parquet#0"]


def test_the_files_own_uri_column_names_the_rows(tmp_path: Path) -> None:
    table = pa.table({"image": ["x.png", None, "z.png"], "e": list_column(ROWS[:3], "list")})
    pq.write_table(table, tmp_path / "e.parquet")
    embeddings = open_file(tmp_path / "e.parquet")
    assert embeddings.uris("image").to_pylist() == ["x.png", f"{tmp_path}/e.parquet#1", "z.png"]
    assert embeddings.uris("e").to_pylist() == [f"{tmp_path}/e.parquet#{row}" for row in range(3)]


def _npy(path: Path, array: np.ndarray) -> Path:
    np.save(path / "e.npy", array)
    return path / "e.npy"


def _parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path / "e.parquet")
    return path / "e.parquet"


def _table(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path / "e.parquet")
    return path / "e.parquet"


def _damaged(path: Path) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 16 + data[20:])
    return path


def _bytes(path: Path, name: str) -> Path:
    (path / name).write_bytes(b"neither this nor that")
    return path / name


REFUSED: dict[str, tuple[Any, str | None, str]] = {
    "not there": (lambda path: path / "gone.npy", None, "does not exist"),
    "another format": (lambda path: _bytes(path, "e.csv"), None, r"is not a \.npy or \.parquet file"),
    "empty folder": (lambda path: path, None, r"no \.parquet file in the folder"),
    "one axis": (lambda path: _npy(path, np.ones(5)), None, r"has shape \(5,\); needed is \(images, dimensions\)"),
    "three axes": (lambda path: _npy(path, np.ones((5, 2, 2))), None, r"has shape \(5, 2, 2\)"),
    "no rows": (lambda path: _npy(path, np.ones((0, 4))), None, r"has shape \(0, 4\)"),
    "integers": (lambda path: _npy(path, np.ones((5, 2), np.int64)), None, "holds int64; needed is floating point"),
    "objects": (lambda path: _npy(path, np.array([[None]])), None, r"cannot be read as a \.npy array"),
    "damaged npy": (lambda path: _bytes(path, "e.npy"), None, r"cannot be read as a \.npy array"),
    "damaged parquet": (lambda path: _bytes(path, "e.parquet"), None, "cannot be read as Parquet"),
    "no list column": (lambda path: _parquet(path, x=[1.0]), None, r"has no list column; it has x \(double\)"),
    "two list columns": (lambda path: _parquet(path, a=[[1.0]], b=[[1.0]]), None, "list columns a, b: name one"),
    "no such column": (lambda path: _parquet(path, vector=[[1.0]]), "vectr", "did you mean 'vector'"),
    "not a list": (lambda path: _parquet(path, x=[1.0], y=[[1.0]]), "x", "is double, not a list of floats"),
    "a list of text": (lambda path: _parquet(path, x=[["a"]]), None, "not a list of floats|holds object"),
    "a list of integers": (lambda path: _parquet(path, x=[[1]]), None, "holds int64"),
    "an empty list": (
        lambda path: _parquet(path, x=pa.array([[]], pa.list_(pa.float32()))),
        None,
        "first rows are empty",
    ),
    "two columns of a name": (
        lambda path: _table(path, pa.table([[[1.0]], [[2.0]]], names=["x", "x"])),
        None,
        "has 2 columns 'x'",
    ),
    "lists of no values": (lambda path: _parquet(path, x=pa.array([[]], pa.list_(pa.float32(), 0))), None, "Parquet"),
    "a damaged page": (lambda path: _damaged(_parquet(path, x=[[1.0]] * 9)), None, "cannot be read as Parquet"),
}
NOT_FINITE = "NaN, null or infinite values, as float"
BAD_ROWS: dict[str, tuple[Any, dict[int, str]]] = {
    "another length": ([[1.0, 2.0], [3.0], [], [1.0] * 9], {1: "1 values; ", 2: "0 values; ", 3: "9 values; "}),
    "the first is another length": ([[3.0], [1.0, 2.0], [1.0, 2.0]], {0: "1 values; the others have 2"}),
    "a null row": ([[1.0, 2.0], None, [3.0, 4.0], None], {1: "null: ", 3: "null: "}),
    "the first is null": ([None, [1.0, 2.0], [3.0, 4.0]], {0: "null: "}),
    "a null value": ([[1.0, 2.0], [1.0, None], [None, None]], {1: NOT_FINITE, 2: NOT_FINITE}),
    "nan and infinity": ([[1.0, np.nan], [1.0, 2.0], [-np.inf, 2.0]], {0: NOT_FINITE, 2: NOT_FINITE}),
    "all kinds": (
        [[1.0, 2.0], None, [np.nan, 1.0], [1.0], [3.0, 4.0]],
        {1: "null: ", 2: NOT_FINITE, 3: "1 values; "},
    ),
}


def problems_of(embeddings: embedding_files.Embeddings, num_rows: int, start: int = 0) -> dict[int, str]:
    found, row = {}, start
    for block in embeddings.blocks(num_rows, start):
        assert np.flatnonzero(~block.is_usable_n).tolist() == sorted(block.problems())
        assert np.isnan(block.rows_nD[~block.is_usable_n]).any(axis=1).all() or np.isinf(block.rows_nD).any()
        found |= {row + bad: text for bad, text in block.problems().items()}
        row += len(block.rows_nD)
    return found


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_cannot_be_used_costs_itself(tmp_path: Path, case: str, kind: pa.DataType) -> None:
    rows, wanted = BAD_ROWS[case]
    halves: Any = [None if row is None else [None if v is None else np.float16(v) for v in row] for row in rows]
    values = pa.array(halves if kind == pa.float16() else rows, pa.list_(kind))
    pq.write_table(pa.table({"x": values}), tmp_path / "e.parquet", row_group_size=2)
    embeddings = open_file(tmp_path / "e.parquet")
    assert embeddings.dim == 2
    good = [i for i in range(len(rows)) if i not in wanted]
    for num_rows in (1, 2, 100):
        problems = problems_of(embeddings, num_rows)
        assert problems.keys() == wanted.keys()
        assert all(problems[row].startswith(text) for row, text in wanted.items())
        blocks = list(embeddings.blocks(num_rows))
        kept = np.concatenate([block.rows_nD[block.is_usable_n] for block in blocks])
        assert kept.tolist() == [rows[i] for i in good]
    assert problems_of(embeddings, 1, 1) == {row: text for row, text in problems_of(embeddings, 1).items() if row >= 1}


def test_a_null_in_a_column_of_fixed_length_costs_its_row(tmp_path: Path) -> None:
    rows = pa.array([[1.0, 2.0], None, [3.0, 4.0], [5.0, None]], pa.list_(pa.float32(), 2))
    embeddings = open_file(_parquet(tmp_path, x=rows))
    (block,) = embeddings.blocks(10)
    assert block.is_usable_n.tolist() == [True, False, True, False]
    assert block.rows_nD[block.is_usable_n].tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_row_of_an_array_that_is_not_finite_costs_itself(tmp_path: Path, is_remote: bool) -> None:
    path = _npy(tmp_path, np.array([[1.0, 2.0], [np.nan, 1.0], [1e300, 1.0], [3.0, 4.0]]))
    system = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()) if is_remote else pafs.LocalFileSystem()
    name = "e.npy" if is_remote else str(path)
    embeddings = NpyEmbeddings(EmbeddingFile(system, name, "s3://bucket/e.npy", path.stat().st_size, None))
    assert problems_of(embeddings, 3) == dict.fromkeys((1, 2), f"{NOT_FINITE}32")


def test_all_rows_of_a_file_of_another_length_are_bad_where_the_length_is_known(tmp_path: Path) -> None:
    file = open_file(_parquet(tmp_path, x=[[1.0, 2.0], [3.0, 4.0]])).files[0]
    assert ParquetEmbeddings([file], "x", 3).dim == 3
    assert problems_of(ParquetEmbeddings([file], "x", 3), 9) == dict.fromkeys((0, 1), "2 values; the others have 3")


@pytest.mark.parametrize("case", REFUSED)
def test_embeddings_that_cannot_work_are_refused_with_what_is_wrong(tmp_path: Path, case: str) -> None:
    make, column, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        list(open_file(make(tmp_path), column).blocks(100))


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(InputError, match="is neither a file nor a folder"):
        open_file(tmp_path / "pipe.npy")


def test_a_remote_array_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = _npy(tmp_path, ROWS)
    path.write_bytes(path.read_bytes()[:-1])
    remote = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    with pytest.raises(InputError, match="it is cut off"):
        NpyEmbeddings(EmbeddingFile(remote, "e.npy", "s3://bucket/e.npy", path.stat().st_size, None))


def test_names_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    names = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers())
    file = open_file(_table(tmp_path, pa.table({"x": [[1.0], [2.0]], "uri": names})))
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        file.uris("uri")


def listed(tmp_path: Path, images: Path) -> list[str]:
    np.save(tmp_path / "x.npy", np.zeros((3, 2), dtype=np.float32))
    config = Config.model_validate(
        {"embeddings": {"uri": str(tmp_path / "x.npy"), "images": str(images)}, "num_clusters": 2, "output": "/out"}
    )
    writer = ArtifactWriter(Folder.at(tmp_path / "listing"))
    list_images.run(config, StageContext(writer, {}, Progress("images", quiet=True)))
    return list(pq.read_table(tmp_path / "listing" / "images-00000.parquet")["uri"].to_pylist())


def test_a_list_names_the_image_of_each_row(tmp_path: Path) -> None:
    (tmp_path / "photos.txt").write_text("# comment\na.jpg\n/b/c.png\ns3://bucket/d.jpg\n")
    wanted = [str(tmp_path / "a.jpg"), "/b/c.png", "s3://bucket/d.jpg"]
    assert listed(tmp_path, tmp_path / "photos.txt") == wanted
    pq.write_table(pa.table({"uri": wanted[::-1]}), tmp_path / "photos.parquet")
    assert listed(tmp_path, tmp_path / "photos.parquet") == wanted[::-1]


@pytest.mark.parametrize("names", ["a\nb\n", "a\nb\nc\nd\n"])
def test_a_list_of_another_length_is_refused(tmp_path: Path, names: str) -> None:
    (tmp_path / "photos.txt").write_text(names)
    with pytest.raises(InputError, match=rf"names {len(names) // 2} images, but there are 3"):
        listed(tmp_path, tmp_path / "photos.txt")


def test_a_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no file"):
        listed(tmp_path, tmp_path / "nothing.txt")
