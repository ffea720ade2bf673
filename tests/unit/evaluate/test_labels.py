from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray.config import Config
from icce_ray.errors import InputError
from icce_ray.evaluate.labels import check_labels, load_labels

URIS = ["/data/cat/1.png", "/data/cat/2.png", "/data/dog/1.png", "/data/eel/3.png"]
IMAGES = pa.table({"image_id": range(4), "uri": URIS})
ALL = np.arange(4)


def config(labels: str | Path, **settings: Any) -> Config:
    evaluate = {"labels": str(labels), **settings}
    return Config.model_validate(
        {"images": {"uri": "/data"}, "output": "/out", "num_clusters": 2, "evaluate": evaluate}
    )


def write_csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_parent_folder_is_the_label() -> None:
    labels = load_labels(config("folder"), IMAGES, np.array([0, 2, 3]))
    assert labels.names == ("cat", "dog", "eel")
    assert labels.classes.tolist() == [0, 1, 2]


def test_a_single_folder_is_no_labelling() -> None:
    images = pa.table({"image_id": [0, 1], "uri": URIS[:2]})
    with pytest.raises(InputError, match="all images lie in one folder, /data/cat"):
        load_labels(config("folder"), images, np.arange(2))


def test_an_array_is_in_the_order_of_all_listed_images(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.array([7, 10, 9, 7], dtype=np.uint8))
    labels = load_labels(config(tmp_path / "y.npy"), IMAGES, np.array([1, 2, 3]))
    assert labels.names == ("7", "9", "10")
    assert labels.classes.tolist() == [2, 1, 0]


def test_a_wrong_number_of_labels_names_both_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.arange(3))
    np.save(tmp_path / "other.npy", np.zeros((4, 2), dtype=int))
    for function in (lambda c: load_labels(c, IMAGES, ALL), lambda c: check_labels(c, IMAGES)):
        with pytest.raises(InputError, match="3 labels, but there are 4 images"):
            function(config(tmp_path / "y.npy"))
    check_labels(config(tmp_path / "y.npy"))
    with pytest.raises(InputError, match=r"int64 of shape \(4, 2\)"):
        check_labels(config(tmp_path / "other.npy"))


def test_whole_numbers_may_be_floats_and_fractions_may_not(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.array([1.0, 0.0, 1.0, 2.0]))
    assert load_labels(config(tmp_path / "y.npy"), IMAGES, ALL).names == ("0", "1", "2")
    np.save(tmp_path / "y.npy", np.array([1.0, 0.5, 1.0, 2.0]))
    with pytest.raises(InputError, match="fractions"):
        check_labels(config(tmp_path / "y.npy"))


def test_a_table_without_a_uri_column_is_in_the_order_of_the_images(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "label", "b", "a", "b", "c")
    assert load_labels(config(csv), IMAGES, ALL).classes.tolist() == [1, 0, 1, 2]
    pq.write_table(pa.table({"kind": [5, 6, 5, 5]}), tmp_path / "y.parquet")
    parquet = config(tmp_path / "y.parquet", label_column="kind")
    assert load_labels(parquet, IMAGES, ALL).classes.tolist() == [0, 1, 0, 0]


def test_images_are_matched_by_whole_uri_or_its_end(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "file,label", "3.png,z", "./dog/1.png,y", "cat/1.png,x", "/data/cat/2.png,x",
                    "not/here.png,w")  # fmt: skip
    labels = load_labels(config(csv, uri_column="file"), IMAGES, ALL)
    assert [labels.names[code] for code in labels.classes] == ["x", "x", "y", "z"]


def test_an_ambiguous_name_is_refused(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "file,label", "1.png,x")
    with pytest.raises(InputError, match=r"'1.png' fits 2 images \(/data/cat/1.png, /data/dog/1.png\)"):
        load_labels(config(csv, uri_column="file"), IMAGES, ALL)


def test_the_end_of_a_name_is_no_match(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "file,label", "at/2.png,x")
    with pytest.raises(InputError, match=r"no label for 1 of 1 images, e\.g\. /data/cat/2\.png"):
        load_labels(config(csv, uri_column="file"), IMAGES, np.array([1]))


def test_images_without_a_label_are_counted_unless_nobody_asks_for_them(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "file,label", "cat/1.png,x", "cat/2.png,y")
    with pytest.raises(InputError, match="no label for 2 of 4 images"):
        load_labels(config(csv, uri_column="file"), IMAGES, ALL)
    assert load_labels(config(csv, uri_column="file"), IMAGES, np.array([0, 1])).classes.tolist() == [0, 1]


def test_an_image_named_twice_is_refused(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "file,label", "cat/2.png,x", "/data/cat/2.png,y")
    with pytest.raises(InputError, match=r"names the image /data/cat/2\.png twice"):
        load_labels(config(csv, uri_column="file"), IMAGES, np.array([1]))


def test_a_missing_column_lists_those_there_are(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "y.csv", "file,lable", "a,x")
    with pytest.raises(InputError, match="no column 'label'; it has file, lable; did you mean 'lable'"):
        check_labels(config(csv))
    with pytest.raises(InputError, match=r"evaluate\.uri_column.* no column 'uri'"):
        check_labels(config(csv, label_column="lable", uri_column="uri"))


def test_a_row_without_a_label_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [1, None, 1, 2]}), tmp_path / "y.parquet")
    with pytest.raises(InputError, match="row 1 has no label"):
        load_labels(config(tmp_path / "y.parquet"), IMAGES, ALL)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("y.npy", None, "there is no such file"),
        ("y.txt", b"1", r"a file that ends with \.npy, \.csv, \.parquet"),
        ("y.npy", b"nonsense", "cannot be read"),
        ("y.parquet", b"nonsense", "cannot be read"),
        ("y.csv", b"", "cannot be read"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        check_labels(config(tmp_path / name))


def test_pickled_labels_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.array(["a", None], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        check_labels(config(tmp_path / "y.npy"))
