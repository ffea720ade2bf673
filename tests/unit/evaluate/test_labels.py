from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray.config import EvaluateConfig
from icce_ray.errors import InputError
from icce_ray.evaluate import label_files
from icce_ray.evaluate import labels as labels_module
from icce_ray.evaluate.labels import TrueLabels, check_labels, named_images

URIS = ["/data/cat/1.png", "/data/cat/2.png", "/data/dog/1.png", "/data/eel/3.png"]
ALL = np.arange(4)


def load_labels(evaluate: EvaluateConfig, uris: list[str], image_ids: np.ndarray) -> TrueLabels:
    """Labels of some of the listed images, whose `uris` are given in the order of their ids."""
    return labels_module.load_labels(evaluate, [uris[i] for i in image_ids], image_ids, len(uris))


def config(labels: str | Path, **settings: Any) -> EvaluateConfig:
    return EvaluateConfig(labels=str(labels), **settings)


def write_csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_parent_folder_is_the_label() -> None:
    labels = load_labels(config("folder"), URIS, np.array([0, 2, 3]))
    assert labels.names == ("cat", "dog", "eel")
    assert labels.classes.tolist() == [0, 1, 2]


def test_a_single_folder_is_no_labelling() -> None:
    with pytest.raises(InputError, match="all images are in one folder, /data/cat"):
        load_labels(config("folder"), URIS[:2], np.arange(2))


@pytest.mark.parametrize("container", ["shard.tar#512+{}/{}.jpg", "table.parquet#{}/image"])
def test_images_of_one_container_are_in_its_folder_and_not_each_in_one_of_its_own(container: str) -> None:
    uris = [f"/data/{container.format(number, number)}" for number in range(5)]
    with pytest.raises(InputError, match="all images are in one folder, /data"):
        check_labels(config("folder"), uris)
    uris = [f"/data/{'ab'[number % 2]}/{container.format(number, number)}" for number in range(5)]
    assert load_labels(config("folder"), uris, np.arange(5)).classes.tolist() == [0, 1, 0, 1, 0]


def test_folders_within_a_tar_are_labels() -> None:
    uris = [f"/data/x.tar#{number}+9/{'ab'[number % 2]}/{number}.jpg" for number in range(4)]
    labels = load_labels(config("folder"), uris, ALL)
    assert (labels.names, labels.classes.tolist()) == (("a", "b"), [0, 1, 0, 1])


def test_percent_and_number_signs_in_folder_names_are_text() -> None:
    uris = ["/data/a%20b/1.png", "/data/c#/2.png", "/data/50%25#/3.png", "file:///data/d%20e/4.png"]
    assert load_labels(config("folder"), uris, ALL).names == ("50%25#", "a%20b", "c#", "d e")


def test_composed_and_decomposed_folder_names_are_the_same_class() -> None:
    uris = ["/data/caf\u00e9/1.png", "/data/cafe\u0301/2.png", "/data/x/3.png"]
    assert load_labels(config("folder"), uris, np.arange(3)).classes.tolist() == [0, 0, 1]


def test_an_array_is_in_the_order_of_all_listed_images(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.array([7, 10, 9, 7], dtype=np.uint8))
    labels = load_labels(config(tmp_path / "y.npy"), URIS, np.array([1, 2, 3]))
    assert labels.names == ("7", "9", "10")
    assert labels.classes.tolist() == [2, 1, 0]


def test_a_wrong_number_of_labels_names_both_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.arange(3))
    np.save(tmp_path / "other.npy", np.zeros((4, 2), dtype=int))
    for function in (lambda c: load_labels(c, URIS, ALL), lambda c: check_labels(c, URIS)):
        with pytest.raises(InputError, match="3 labels, but there are 4 images"):
            function(config(tmp_path / "y.npy"))
    check_labels(config(tmp_path / "y.npy"))
    with pytest.raises(InputError, match=r"int64 of shape \(4, 2\)"):
        check_labels(config(tmp_path / "other.npy"))


def test_whole_numbers_may_be_floats_and_fractions_may_not(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.array([1.0, 0.0, 1.0, 2.0]))
    assert load_labels(config(tmp_path / "y.npy"), URIS, ALL).names == ("0", "1", "2")
    np.save(tmp_path / "y.npy", np.array([1.0, 0.5, 1.0, 2.0]))
    with pytest.raises(InputError, match=r"row 1 holds 0\.5; labels are whole numbers or text"):
        check_labels(config(tmp_path / "y.npy"))


def test_a_table_without_a_uri_column_is_in_the_order_of_the_images(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "label", "b", "a", "b", "c")
    assert load_labels(config(csv), URIS, ALL).classes.tolist() == [1, 0, 1, 2]
    pq.write_table(pa.table({"kind": [5, 6, 5, 5]}), tmp_path / "y.parquet")
    parquet = config(tmp_path / "y.parquet", label_column="kind")
    assert load_labels(parquet, URIS, ALL).classes.tolist() == [0, 1, 0, 0]


def test_images_are_matched_by_whole_uri_or_its_end(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "file,label", "3.png,z", "./dog/1.png,y", "cat/1.png,x", "/data/cat/2.png,x",
                    "not/here.png,w")  # fmt: skip
    labels = load_labels(config(csv, uri_column="file"), URIS, ALL)
    assert [labels.names[code] for code in labels.classes] == ["x", "x", "y", "z"]


def test_an_ambiguous_name_is_refused(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "file,label", "1.png,x")
    with pytest.raises(InputError, match=r"'1.png' fits 2 images \(/data/cat/1.png, /data/dog/1.png\)"):
        load_labels(config(csv, uri_column="file"), URIS, ALL)


def test_the_end_of_a_name_is_no_match(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "file,label", "at/2.png,x")
    with pytest.raises(InputError, match=r"fits none of the images: .* at/2\.png, .* /data/cat/2\.png"):
        load_labels(config(csv, uri_column="file"), URIS, np.array([1]))


def test_labels_for_some_of_the_images_are_enough(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "file,label", "3.png,y", "cat/2.png,x")
    labels = load_labels(config(csv, uri_column="file"), URIS, ALL)
    assert (labels.image_ids.tolist(), labels.classes.tolist()) == ([1, 3], [0, 1])
    assert labels.classes_of(np.array([3, 0, 1, 9])).tolist() == [1, -1, 0, -1]


def test_an_image_named_twice_is_refused(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "file,label", "cat/2.png,x", "/data/cat/2.png,y")
    with pytest.raises(InputError, match=r"names the image /data/cat/2\.png twice"):
        load_labels(config(csv, uri_column="file"), URIS, np.array([1]))


def test_a_missing_column_lists_those_there_are(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "file,lable", "a,x")
    with pytest.raises(InputError, match="no column 'label'; it has file, lable; did you mean 'lable'"):
        check_labels(config(csv))
    with pytest.raises(InputError, match=r"evaluate\.uri_column.* no column 'uri'"):
        check_labels(config(csv, label_column="lable", uri_column="uri"))


def write_labels(path: Path, values: Any) -> EvaluateConfig:
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"label": values}), path)
    else:
        write_csv(path, "label,other", *(f"{value},x" for value in values))
    return config(path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("y.parquet", [1, None, 1, 2]),
        ("y.parquet", [1.0, np.nan, 1.0, 2.0]),
        ("y.parquet", ["a", " ", "a", "b"]),
        ("y.npy", np.array([1, np.nan, 1, 2])),
        ("y.npy", np.array(["a", "", "a", "b"])),
        ("y.csv", ["a", "", "a", "b"]),
        ("y.csv", [1, "NaN", 1, 2]),
    ],
)
def test_a_row_without_a_label_is_refused_before_the_images_are_listed(tmp_path: Path, name: str, values: Any) -> None:
    with pytest.raises(InputError, match="row 1 has no label"):
        check_labels(write_labels(tmp_path / name, values))


@pytest.mark.parametrize(
    ("name", "values"), [("y.csv", ["1", "01", "001", "1"]), ("y.parquet", ["1", "01", "001", "1"])]
)
def test_text_stays_text(tmp_path: Path, name: str, values: list[str]) -> None:
    labels = load_labels(write_labels(tmp_path / name, values), URIS, ALL)
    assert labels.classes.tolist() == [2, 1, 0, 2]
    assert labels.names == ("001", "01", "1")


@pytest.mark.parametrize(
    "values",
    [
        pa.array([3, 9, 10, 3], pa.int8()),
        pa.array(["3", "9", "10", "3"], pa.large_string()),
        pa.array(["3", "9", "10", "3"]).dictionary_encode(),
        pa.array([3.0, 9.0, 10.0, 3.0]),
        np.array([b"3", b"9", b"10", b"3"]),
    ],
)
def test_labels_of_any_whole_number_or_text_type_are_the_same(tmp_path: Path, values: Any) -> None:
    path = tmp_path / ("y.npy" if isinstance(values, np.ndarray) else "y.parquet")
    labels = load_labels(write_labels(path, values), URIS, ALL)
    assert (labels.names, labels.classes.tolist()) == (("3", "9", "10"), [0, 1, 2, 0])


def test_other_types_of_columns_are_refused(tmp_path: Path) -> None:
    lists = write_labels(tmp_path / "y.parquet", pa.array([[1], [2], [1], [2]]))
    with pytest.raises(InputError, match=r"column 'label' holds list.*; labels are whole numbers or text"):
        check_labels(lists)
    pq.write_table(pa.table({"label": [1, 2], "file": [3, 4]}), tmp_path / "y.parquet")
    with pytest.raises(InputError, match=r"evaluate\.uri_column: .*column 'file' holds int64; give text"):
        check_labels(config(tmp_path / "y.parquet", uri_column="file"))


@pytest.mark.parametrize("name", ["y.csv", "y.parquet"])
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, name: str) -> None:
    if name == "y.csv":
        write_csv(tmp_path / name, "label,label", "a,b")
    else:
        pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["label", "label"]), tmp_path / name)
    with pytest.raises(InputError, match="has 2 columns 'label'"):
        check_labels(config(tmp_path / name))


def test_a_class_for_each_image_is_no_labelling(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"each of 4 images has a class of its own, e\.g\. a, b, c"):
        check_labels(write_labels(tmp_path / "y.csv", ["a", "b", "c", "d"]), URIS)


def test_names_that_fit_no_image_are_refused_before_the_work(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "file,label", "4.png,x", "5.png,x")
    with pytest.raises(InputError, match="column 'file' fits none of the images"):
        check_labels(config(csv, uri_column="file"), URIS)
    csv = write_csv(tmp_path / "y.csv", "file,label", "1.png,x", "5.png,x")
    with pytest.raises(InputError, match=r"'1\.png' fits 2 images"):
        check_labels(config(csv, uri_column="file"), URIS)


def test_names_match_in_any_normal_form_and_within_a_tar(tmp_path: Path) -> None:
    uris = ["/data/caf\u00e9.png", "/data/50%.png", "/data/x.tar#512+3/a/1.png", "/data/x#1.png"]
    lines = ["cafe\u0301.png,a", "50%.png,b", "a/1.png,c", "x#1.png,d"]
    csv = write_csv(tmp_path / "y.csv", "file,label", *lines)
    labels = load_labels(config(csv, uri_column="file"), uris, ALL)
    assert [labels.names[code] for code in labels.classes] == ["a", "b", "c", "d"]


def test_images_of_one_name_are_not_compared_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [f"/data/{number}/image.png" for number in range(2_000)]
    csv = write_csv(tmp_path / "y.csv", "file,label", *(f"{number}/image.png,{number % 3}" for number in range(2_000)))
    cut, last = list[str](), labels_module._last
    monkeypatch.setattr(labels_module, "_last", lambda path, length: cut.append(path) or last(path, length))
    labels = load_labels(config(csv, uri_column="file"), uris, np.arange(2_000))
    assert cut == uris, "each path once"
    assert labels.classes.tolist() == [number % 3 for number in range(2_000)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("y.npy", None, "there is no such file"),
        ("y.txt", b"1", r"a file that ends with \.npy, \.csv, \.parquet"),
        ("y.npy", b"nonsense", "cannot be read"),
        ("y.parquet", b"nonsense", "cannot be read"),
        ("y.csv", b"", "cannot be read"),
        ("y.csv", "label\na\nb".encode("utf-16"), "cannot be read"),
        ("y.csv", b"label\ncaf\xe9\n", "cannot be read"),
        ("y.csv", b"file;label\n1.png;x\n", "its columns are separated by ';'"),
        ("y.csv", b"label\n", "holds no labels"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        check_labels(config(tmp_path / name))


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.array([b"a", b"\xff"]))
    raw = pa.array([b"a", b"\xff"])
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"label": ["a", "b"], "file": text}), tmp_path / "y.parquet")
    for name, uri_column in (("y.npy", None), ("y.parquet", "file")):
        with pytest.raises(InputError, match="cannot be read"):
            check_labels(config(tmp_path / name, uri_column=uri_column))


def test_images_without_cls_files_are_refused_before_the_work() -> None:
    with pytest.raises(InputError, match=r"'cls', but 4 of 4 images have no \.cls file"):
        check_labels(config("cls"), URIS)


def test_pickled_labels_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.array(["a", None], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        check_labels(config(tmp_path / "y.npy"))


@pytest.mark.parametrize("name", ["y.npy", "y.csv", "y.parquet"])
def test_files_are_read_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(label_files, "BATCH_ROWS", 3)
    values = np.random.default_rng(0).integers(9, size=100)
    uris = [f"/data/{number}.png" for number in range(100)]
    ids = np.sort(np.random.default_rng(1).permutation(100)[:40])
    labels = load_labels(write_labels(tmp_path / name, values), uris, ids)
    assert [labels.names[code] for code in labels.classes] == values[ids].astype(str).tolist()
    with pytest.raises(InputError, match="row 77 has no label"):
        check_labels(write_labels(tmp_path / name, np.where(np.arange(100) == 77, "", "x")))


def test_a_column_of_a_csv_file_may_turn_to_text_after_a_million_bytes(tmp_path: Path) -> None:
    rows = [f"{number},{'' if number < 150_000 else 'x'}{number}" for number in range(150_001)]
    check_labels(config(write_csv(tmp_path / "y.csv", "label,other", *rows)))


@pytest.mark.parametrize("batch_rows", [9, 70, 1000])
def test_of_many_names_a_part_is_drawn_by_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    monkeypatch.setattr(label_files, "BATCH_ROWS", batch_rows)
    monkeypatch.setattr(labels_module, "ROWS_AT_ONCE", 64)
    uris = [f"s3://bucket/{number % 30}/{number // 30}.png" for number in range(900)]
    listing: Any = FakeListing(uris)
    names = [uri.removeprefix("s3://bucket/") if number % 2 else uri for number, uri in enumerate(uris)]
    pq.write_table(pa.table({"label": np.arange(800) % 7, "uri": names[:800]}), tmp_path / "y.parquet")
    found = named_images(config(tmp_path / "y.parquet", uri_column="uri"), listing, 150)
    ids = found.image_ids.tolist()
    assert 75 < len(ids) <= 150
    assert ids == sorted(ids)
    assert ids[-1] < 800
    assert [found.names[code] for code in found.classes] == [str(number % 7) for number in ids]
    again = named_images(config(tmp_path / "y.parquet", uri_column="uri"), listing, 150)
    assert again.image_ids.tolist() == ids
    everything = named_images(config(tmp_path / "y.parquet", uri_column="uri"), listing, 800)
    assert everything.image_ids.tolist() == list(range(800))


class FakeListing:
    def __init__(self, uris: list[str]) -> None:
        self.uris = uris

    def __len__(self) -> int:
        return len(self.uris)

    def table(self, start: int, stop: int) -> pa.Table:
        return pa.table({"uri": self.uris[start:stop]})
