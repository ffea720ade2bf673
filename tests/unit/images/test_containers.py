from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray.config import Config, EvaluateConfig
from icce_ray.errors import InputError
from icce_ray.evaluate.labels import check_labels, load_labels
from icce_ray.images import job
from icce_ray.images.containers import Cell, Span, file_of, labels_beside, locate, members, read_cell, row_group
from icce_ray.images.file_shards import File
from icce_ray.images.listing import Listing
from icce_ray.images.read_images import read_image
from icce_ray.images.uris import read_parquet_list
from icce_ray.pipeline import run as pipeline

Listed = Callable[[Config], pa.Table]


def config_for(*uris: Path, **images: str) -> Config:
    return Config(output="unused", num_clusters=2, images={"uri": [str(uri) for uri in uris]} | images)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_every_image_of_a_tar_is_listed_and_read_by_its_place(listed: Listed, tmp_path: Path) -> None:
    files = {f"x/{number}.{ending}": f"{number}{ending}".encode() * 300 for number in range(9) for ending in ("JPG", "cls", "json")}  # fmt: skip  # noqa: E501
    files |= {"./top.png": b"top", "x/._0.jpg": b"of a file manager", "long/" + "n" * 150 + ".png": b"long"}
    write_tar(tmp_path / "0.tar", files)
    rows = listed(config_for(tmp_path)).to_pylist()
    assert [row["uri"].rpartition("+")[2].partition("/")[2] for row in rows] == [
        *(f"x/{number}.JPG" for number in range(9)), "top.png", "long/" + "n" * 150 + ".png",
    ]  # fmt: skip
    for row in rows:
        data = read_image(row["uri"], row["size_bytes"])
        assert data in files.values()
        assert len(data) == row["size_bytes"]
    assert {row["etag"] for row in rows} == {str((tmp_path / "0.tar").stat().st_mtime_ns)}


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_every_image_of_a_parquet_file_is_listed_and_read_by_its_row(listed: Listed, tmp_path: Path, kind: str) -> None:
    values = [f"image {number}".encode() for number in range(25)] + [None]
    if kind == "struct":
        column = pa.array([{"bytes": value, "path": "x"} for value in values])
    else:
        column = pa.array(values, getattr(pa, kind)())
    pq.write_table(pa.table({"picture": column, "label": range(26)}), tmp_path / "t.parquet", row_group_size=7)
    rows = listed(config_for(tmp_path / "t.parquet")).to_pylist()
    assert [row["uri"] for row in rows] == [f"{tmp_path}/t.parquet#{number}/picture" for number in range(26)]
    for number in (0, 24, 6, 7, 13, 14):
        assert read_image(rows[number]["uri"]) == values[number]
    assert read_image(rows[25]["uri"]) == ("missing" if kind == "struct" else "null: the row has no image")
    assert str(read_image(f"{tmp_path}/t.parquet#26/picture")).startswith("unreadable: IndexError")


def test_which_column_holds_the_images_is_found_or_asked_for(listed: Listed, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": [b"1", b"2"], "b": [b"3", b"4"], "n": [1, 2]}), path)
    with pytest.raises(InputError, match=r"the binary columns a, b: name images\.bytes_column"):
        listed(config_for(path))
    assert len(listed(config_for(path, bytes_column="b"))) == 2
    for column, message in (("n", "'n' in .* is int64, not binary"), ("c", "no column 'c'; it has a, b, n")):
        with pytest.raises(InputError, match=message):
            listed(config_for(path, bytes_column=column))
    pq.write_table(pa.table({"uri": ["/x.png", "/y.png"], "thumbnail": [b"1", b"2"]}), path)
    assert listed(config_for(path))["uri"].to_pylist() == ["/x.png", "/y.png"]
    assert listed(config_for(path, bytes_column="thumbnail"))["uri"][0].as_py().endswith("#0/thumbnail")


def test_a_table_beside_images_is_no_source(listed: Listed, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    pq.write_table(pa.table({"label": [1, 2]}), tmp_path / "labels.parquet")
    assert len(listed(config_for(tmp_path))) == 2


def test_a_parquet_file_of_images_beside_images_is_taken_and_a_damaged_one_is_a_row(
    listed: Listed, tmp_path: Path
) -> None:
    (tmp_path / "readme.png").write_bytes(b"x")
    pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / "data.parquet")
    pq.write_table(pa.table({"uri": ["/elsewhere.png"]}), tmp_path / "list.parquet")
    (tmp_path / "zz.parquet").write_bytes(b"PAR1 no PAR1")
    rows = listed(config_for(tmp_path)).to_pylist()
    assert [Path(row["uri"].partition("#")[0]).name for row in rows] == ["data.parquet"] * 2 + [
        "readme.png",
        "zz.parquet",
    ]
    assert [row["problem"] is None for row in rows] == [True, True, True, False]
    assert rows[3]["problem"].startswith("damaged Parquet file: ")


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.uint8()),
        pa.large_list(pa.uint8()),
        pa.binary_view(),
        pa.binary(3),
        pa.dictionary(pa.int8(), pa.binary()),
    ],
    ids=str,
)
def test_bytes_are_read_from_every_type_that_holds_them(listed: Listed, tmp_path: Path, kind: pa.DataType) -> None:
    values = [b"abc", b"def"]
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    column = pa.array([list(value) for value in values], kind) if is_list else pa.array(values).cast(kind)
    pq.write_table(pa.table({"picture": column}), tmp_path / "t.parquet")
    rows = listed(config_for(tmp_path / "t.parquet", bytes_column="picture")).to_pylist()
    assert [read_image(row["uri"]) for row in rows] == values
    if is_list:
        with pytest.raises(InputError, match=r"'picture' is (large_)?list<.*uint8.*Name images\.bytes_column"):
            listed(config_for(tmp_path / "t.parquet"))


def test_a_row_with_a_path_instead_of_bytes_is_read_from_there(listed: Listed, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    paths = ["a.png", f"{tmp_path}/a.png", "gone.png", "t.parquet#0/image", None, "http://user:secret@host/x"]
    column = pa.array([{"bytes": None, "path": path} for path in paths])
    column = column.cast(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": column}), tmp_path / "t.parquet")
    found = [read_image(row["uri"]) for row in listed(config_for(tmp_path / "t.parquet")).to_pylist()]
    assert found[:3] == [b"picture", b"picture", "missing"]
    assert found[3] == "unreadable: the row's path leads to a row of a container"
    assert found[4] == "null: the row has no image"
    assert str(found[5]).startswith("unreadable: http://...@host/x")
    assert "secret" not in str(found[5])


def test_a_cell_that_unpacks_to_an_absurd_size_is_not_read(listed: Listed, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [bytes(2**28 + 1)]}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    assert str(read_image(f"{path}#0/image")).startswith("unreadable: ValueError: decompression bomb: ")
    table = pa.table({"uri": ["x" * (2**28 + 1)]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    with pytest.raises(InputError, match="is not read: decompression bomb"):
        listed(config_for(path))


def test_several_sources_are_one_collection_without_repeats(listed: Listed, tmp_path: Path) -> None:
    for name in ("one/b.png", "two/a.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.txt").write_text("one/b.png\ntwo/a.png\n")
    uris = listed(config_for(tmp_path / "two", tmp_path / "one", tmp_path / "list.txt"))["uri"].to_pylist()
    assert uris == [f"{tmp_path}/one/b.png", f"{tmp_path}/two/a.png"]


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("s3://b/x.tar#512+7/a/b.jpg", Span("s3://b/x.tar", 512, 7)),
        ("/x/y.tar#512+7/a#3+4/b.jpg", Span("/x/y.tar", 512, 7)),
        ("/x/y.parquet#12/image", Cell("/x/y.parquet", 12, "image")),
        ("/x/a#1.jpg", None),
        ("/x/e.npy#4", None),
        ("/x/y.tar", None),
    ],
)
def test_a_place_in_a_container_is_told_from_a_file(uri: str, place: Span | Cell | None) -> None:
    assert locate(uri) == place
    assert file_of(uri) == (uri if place is None else place.file)


def test_the_label_of_an_image_in_a_tar_is_the_cls_file_of_its_key(listed: Listed, tmp_path: Path) -> None:
    write_tar(
        tmp_path / "0.tar", {"a/1.jpg": b"x", "a/1.cls": b"7\n", "b/1.cls": b"8", "b/1.big.jpg": b"y", "c.jpg": b""}
    )
    (tmp_path / "d.jpg").write_bytes(b"z")
    uris = listed(config_for(tmp_path))["uri"].to_pylist()
    assert [uri.rpartition("/")[2] for uri in uris] == ["1.jpg", "1.big.jpg", "c.jpg", "d.jpg"]
    assert labels_beside(uris) == ["7", "8", None, None]
    evaluate = EvaluateConfig(labels="cls")
    labels = load_labels(evaluate, [uris[1], uris[0]], np.array([1, 0]), len(uris))
    assert (labels.classes.tolist(), labels.names) == ([1, 0], ("7", "8"))
    with pytest.raises(
        InputError, match=r"1 of 2 images have no \.cls file beside them in a tar shard, e\.g\. .*c\.jpg"
    ):
        load_labels(evaluate, uris[1:3], np.array([1, 2]), len(uris))


def test_shards_that_were_opened_before_a_kill_are_not_opened_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in range(5):
        write_tar(tmp_path / "photos" / f"{number}.tar", {f"{number}-{n}.png": b"x" * n for n in range(3)})
        (tmp_path / "photos" / f"{number}.png").write_bytes(b"y")
    config = config_for(tmp_path / "photos").model_copy(update={"output": str(tmp_path / "out")})
    opened: list[str] = []
    killed_at = ["2.tar"]

    def members_or_kill(container: File, *arguments: Any) -> Any:
        opened.append(Path(container.uri).name)
        if opened[-1] in killed_at:
            raise KeyboardInterrupt
        return members(container, *arguments)

    monkeypatch.setattr(job, "members", members_or_kill)
    monkeypatch.setattr(job, "CONTAINERS_PER_TASK", 1)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_stage(config, pipeline.plan(config)[0], {}, True)
    killed_at.clear()
    artifact = pipeline.run_stage(config, pipeline.plan(config)[0], {}, True)
    assert opened == ["0.tar", "1.tar", "2.tar", "2.tar", "3.tar", "4.tar"]
    names = [row.uri.rpartition("/")[2] for row in Listing(artifact).rows(0, 100)]
    assert names == [name for n in range(5) for name in (f"{n}.png", *(f"{n}-{k}.png" for k in range(3)))]
    assert sorted(path.name for path in Path(artifact.folder.uri).iterdir() if path.name.startswith("members")) == []


def test_a_small_file_that_repeats_a_value_a_thousand_times_stays_small(tmp_path: Path) -> None:
    repeated = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1000, np.int32)), pa.array(["x" * 100_000]))
    images = pa.StructArray.from_arrays([repeated.cast(pa.dictionary(pa.int32(), pa.binary()))], ["bytes"])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"uri": repeated, "image": images}), path, store_schema=False)
    assert path.stat().st_size < 100_000
    assert pq.read_table(path).nbytes > 100_000_000
    assert read_cell(Cell(str(path), 7, "image")) == b"x" * 100_000
    assert row_group(str(path), 0, "image").nbytes < 1_000_000
    assert len({id(entry) for entry in read_parquet_list(str(path), "uri")}) == 1
    with pytest.raises(InputError, match="holds a text of 100,000 bytes; at most 4,096 are read"):
        check_labels(EvaluateConfig(labels=str(path), label_column="uri"))
