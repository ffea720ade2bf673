"""S3 Inventory: the list of a bucket's objects that AWS writes every day or week, as CSV or Parquet files and a
``manifest.json`` that names them. To read it takes a thousandth of the requests that listing the bucket takes."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.config import StorageConfig
from icce_ray.errors import InputError, message_of
from icce_ray.images.bucket_listing import Classify, object_file
from icce_ray.images.file_shards import SHARD_ROWS, File, ends_of, files_table, sorted_files
from icce_ray.store import ArtifactWriter, Folder, Part, PartRecord, PartRecords, s3
from icce_ray.store.filesystem import open_uri

MANIFEST_NAME = "manifest.json"
BATCH_ROWS = 65_536
COLUMNS = ("key", "size", "etag", "islatest", "isdeletemarker")
"""Names without underscores and in lower case: CSV has ``ETag`` where Parquet has ``e_tag``."""


@dataclass(frozen=True)
class Inventory:
    """An inventory, and where its shards go. Pickles."""

    uri: str
    """URI of the manifest."""
    bucket: str
    csv_columns: tuple[str, ...]
    """Empty for Parquet."""
    files: tuple[str, ...]
    """URIs of the data files, of `num_bytes` together."""
    num_bytes: int
    folder: Folder
    storage: StorageConfig
    classify: Classify

    @property
    def records(self) -> PartRecords:
        return PartRecords(self.folder, hashlib.sha256("\n".join((self.uri, *self.files)).encode()).hexdigest())


def open_inventory(
    filesystem: pafs.FileSystem, path: str, uri: str, folder: Folder, storage: StorageConfig, classify: Classify
) -> Inventory:
    """Read a manifest. Raises InputError: it is no manifest of an inventory, or one in ORC."""
    try:
        with filesystem.open_input_file(path) as file:
            content = json.loads(file.read())
        kind, schema = content["fileFormat"], content["fileSchema"]
        bucket, destination = content["sourceBucket"], content["destinationBucket"].rpartition(":")[2]
        files = tuple(f"s3://{destination}/{entry['key']}" for entry in content["files"])
        num_bytes = sum(int(entry["size"]) for entry in content["files"])
    except OSError as error:
        raise InputError(f"images.uri: {uri} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"images.uri: {uri} is not the manifest of an S3 Inventory ({reason})") from None
    if kind not in ("CSV", "Parquet"):
        raise InputError(f"images.uri: {uri} is an inventory as {kind}; configure it as Parquet or CSV")
    columns = tuple(name.strip() for name in schema.split(",")) if kind == "CSV" else ()
    return Inventory(uri, bucket, columns, files, num_bytes, folder, storage, classify)


def shard_name(uri: str) -> str:
    """The name of a data file's record."""
    return hashlib.sha256(uri.encode()).hexdigest()[:16]


def list_data_file(uri: str, inventory: Inventory) -> PartRecord:
    """Write the shards of one data file. Raises InputError: it cannot be read."""
    s3.use_s3(inventory.storage)
    others, tables, ends, parts, num_keys = Counter[str](), list[File](), list[tuple[str, str]](), list[Part](), 0

    def found() -> Iterator[File]:
        nonlocal num_keys
        for key, size, etag, is_latest, is_deleted in _rows(uri, inventory):
            num_keys += 1
            if is_latest in (None, True, "true") and is_deleted in (None, False, "false"):
                key = unquote_plus(key) if inventory.csv_columns else key
                entry = key, None if size in (None, "") else int(size), etag or None
                file = object_file(f"s3://{inventory.bucket}/", entry, inventory.classify, others, tables)
                if file is not None:
                    yield file

    files = found()
    try:
        while batch := list(islice(files, SHARD_ROWS)):
            table = sorted_files(files_table(batch))
            name = f"files/{shard_name(uri)}-{len(parts):03d}.parquet"
            parts.append(ArtifactWriter(inventory.folder).write_table(name, table))
            ends.append(ends_of(table))
    except (OSError, ValueError) as error:
        reason = message_of(error)
        raise InputError(f"images.uri: {uri}, which {inventory.uri} names, cannot be read: {reason}") from None
    metrics = {"ends": ends, "others": others, "tables": tables, "num_keys": num_keys}
    return inventory.records.write(shard_name(uri), parts, metrics)


def _rows(uri: str, inventory: Inventory) -> Iterator[tuple[Any, ...]]:
    """COLUMNS of each row; None where the inventory does not have one."""
    filesystem, path = open_uri(uri)
    if inventory.csv_columns:
        names = {_plain(name): name for name in inventory.csv_columns}
        kept = [names[name] for name in COLUMNS if name in names]
        with filesystem.open_input_stream(path) as stream:
            batches: Any = pacsv.open_csv(
                stream,
                pacsv.ReadOptions(column_names=list(inventory.csv_columns)),
                convert_options=pacsv.ConvertOptions(
                    include_columns=kept, column_types=dict.fromkeys(inventory.csv_columns, pa.string())
                ),
            )
            yield from _columns(batches)
    else:
        with filesystem.open_input_file(path) as file:
            parquet = pq.ParquetFile(file)
            kept = [name for name in parquet.schema_arrow.names if _plain(name) in COLUMNS]
            yield from _columns(parquet.iter_batches(BATCH_ROWS, columns=kept))


def _columns(batches: Any) -> Iterator[tuple[Any, ...]]:
    for batch in batches:
        columns = {_plain(name): values for name, values in batch.to_pydict().items()}
        if "key" not in columns:
            raise ValueError("it has no column of keys")
        yield from zip(*(columns.get(name, [None] * len(batch)) for name in COLUMNS), strict=True)


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
