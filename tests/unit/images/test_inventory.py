"""S3 Inventory as input. A local folder stands for the bucket that AWS writes it to."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from icce_ray.config import Config
from icce_ray.errors import InputError
from icce_ray.images import image_files, inventory, list_images
from icce_ray.runtime.progress import Progress

Row = tuple[str, int | None, str | None, bool, bool]
"""Key, size, ETag, is_latest, is_delete_marker."""
ROWS: list[Row] = [
    ("z/1.jpg", 10, "e1", True, False),
    ("a b/ä+1.png", 11, "e2", True, False),
    ("a b/old.png", 12, "e3", False, False),
    ("a b/gone.png", None, None, True, True),
    ("m/0.tar", 13, "e4", True, False),
    ("m/.hidden/x.png", 14, "e5", True, False),
    ("m/", 0, "e6", True, False),
    ("notes.csv", 15, "e7", True, False),
    ("b.png", 16, "e8", True, False),
]
EXPECTED = [
    ("s3://photos/a b/ä+1.png", 11, "e2"),
    ("s3://photos/b.png", 16, "e8"),
    ("s3://photos/m/0.tar", 13, "e4"),
    ("s3://photos/z/1.jpg", 10, "e1"),
]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The paths that were opened."""
    seen: list[str] = []

    def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
        seen.append(uri)
        return pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), uri.removeprefix("s3://")

    monkeypatch.setattr(image_files, "open_uri", open_uri)
    monkeypatch.setattr(inventory, "open_uri", open_uri)
    return seen


def write_csv(path: Path, rows: list[Row]) -> None:
    lines = [
        f'"photos","{quote_plus(key, safe="/")}","v1","{str(is_latest).lower()}","{str(is_deleted).lower()}",'
        f'"{"" if size is None else size}","2026-01-01T00:00:00.000Z","{etag or ""}"\n'
        for key, size, etag, is_latest, is_deleted in rows
    ]
    path.write_bytes(gzip.compress("".join(lines).encode()))


def write_parquet(path: Path, rows: list[Row]) -> None:
    names = ("key", "size", "e_tag", "is_latest", "is_delete_marker")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table({"bucket": ["photos"] * len(rows), **columns}), path)


WRITERS: dict[str, Callable[[Path, list[Row]], None]] = {"CSV": write_csv, "Parquet": write_parquet}


def write_inventory(root: Path, kind: str, **changes: Any) -> Config:
    data = root / "lists" / "photos" / "daily" / "data"
    data.mkdir(parents=True)
    files = []
    for number in range(3):
        name = f"lists/photos/daily/data/{number}.{'csv.gz' if kind == 'CSV' else 'parquet'}"
        WRITERS[kind](root / name, ROWS[number::3])
        files.append({"key": name.removeprefix("lists/"), "size": (root / name).stat().st_size, "MD5checksum": ""})
    schema = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag"
    manifest = {
        "sourceBucket": "photos",
        "destinationBucket": "arn:aws:s3:::lists",
        "fileFormat": kind,
        "fileSchema": schema if kind == "CSV" else "message s3.inventory { required binary bucket (UTF8); }",
        "files": files,
    }
    (root / "lists" / "manifest.json").write_text(json.dumps(manifest | changes))
    return Config(output=str(root / "out"), num_clusters=2, images={"uri": "s3://lists/manifest.json"})


@pytest.mark.parametrize("kind", WRITERS)
def test_the_objects_of_an_inventory_are_listed_in_order(opened: list[str], tmp_path: Path, kind: str) -> None:
    config = write_inventory(tmp_path, kind)
    _, files = list_images._list(config, Progress("images", quiet=True))
    rows = [row for table in files.tables() for row in table.to_pylist()]
    assert [(row["uri"], row["size_bytes"], row["etag"]) for row in rows] == EXPECTED
    assert [row["is_container"] for row in rows] == [False, False, True, False]
    assert dict(files.skipped) == {"hidden": 1, ".csv": 1}
    # A killed listing goes on with the files that are missing.
    records = sorted((tmp_path / "out").rglob("records/*.json"))
    assert len(records) == 3
    records[1].unlink()
    opened.clear()
    _, again = list_images._list(config, Progress("images", quiet=True))
    assert again.digest == files.digest
    assert len([uri for uri in opened if "/data/" in uri]) == 1


def test_what_is_no_inventory_is_refused_with_the_reason(opened: list[str], tmp_path: Path) -> None:
    config = write_inventory(tmp_path, "CSV", fileFormat="ORC")
    with pytest.raises(InputError, match="is an inventory as ORC; configure it as Parquet or CSV"):
        list_images._list(config, Progress("images", quiet=True))
    for text in ("[]", "{", '{"fileFormat": "CSV"}'):
        (tmp_path / "lists" / "manifest.json").write_text(text)
        with pytest.raises(InputError, match="is not the manifest of an S3 Inventory"):
            list_images._list(config, Progress("images", quiet=True))


def test_an_inventory_without_a_column_of_keys_is_refused(opened: list[str], tmp_path: Path) -> None:
    schema = "Bucket, Name, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag"
    config = write_inventory(tmp_path, "CSV", fileSchema=schema)
    with pytest.raises(
        InputError, match=r"0\.csv\.gz, which .*manifest\.json names, cannot be read: it has no column of"
    ):
        list_images._list(config, Progress("images", quiet=True))


def test_a_data_file_that_cannot_be_read_is_one_message(opened: list[str], tmp_path: Path) -> None:
    config = write_inventory(tmp_path, "Parquet")
    (tmp_path / "lists/photos/daily/data/1.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(InputError, match=r"1\.parquet, which s3://lists/manifest\.json names, cannot be read"):
        list_images._list(config, Progress("images", quiet=True))
