"""The ``images`` stage: every image once, with a dense id in the order of the sorted URIs.

What is listed is a folder, a text or Parquet list of URIs, or the rows of ready-made embeddings. Nothing is opened here
but lists and headers: an image that turns out to be unreadable costs a row of the ``embed`` stage's errors table.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.config import Config
from icce_ray.context import StageContext
from icce_ray.embed.ready_made import find_field, is_string, open_embeddings
from icce_ray.errors import InputError
from icce_ray.store import Folder
from icce_ray.store.filesystem import open_uri

VERSION = 1
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLE_NAME = "images.parquet"
SCHEMA = pa.schema([("image_id", pa.int64()), ("uri", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string())])

Row = tuple[str, int | None, str | None]
"""URI, size in bytes, etag (local files: the time of the last change in ns)."""


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Write ``images.parquet``; metrics: num_images, size_bytes (None where unknown)."""
    started = time.monotonic()
    table = list_images(config)
    context.output.write_table(TABLE_NAME, table)
    context.progress.update(len(table), len(table))
    return {
        "num_images": len(table),
        "size_bytes": pc.sum(table["size_bytes"]).as_py(),
        "list_s": round(time.monotonic() - started, 3),
    }


def list_images(config: Config) -> pa.Table:
    """All images of `config`: image_id int64 (0..M-1), uri string, size_bytes int64 and etag string (null if unknown).

    Usage: ``uris = list_images(config)["uri"].to_pylist()``

    Sorted by URI (bytes of its UTF-8). A URI that a list names twice is one image; a local file of a list that does not
    exist is listed too, and becomes an error row of the ``embed`` stage. Ready-made embeddings keep the order of their
    rows, URIs that repeat included.

    Raises:
        InputError: nothing there, no images, a list that cannot be read, or fewer images than `num_clusters`.
    """
    if config.embeddings.uri is not None:
        embeddings = open_embeddings(config.embeddings)
        _check_count(embeddings.num_rows, config, "embeddings.uri", config.embeddings.uri)
        unknown = pa.nulls(embeddings.num_rows)
        uris = embeddings.uris(config.images.uri_column)
        columns = [pa.array(np.arange(embeddings.num_rows)), uris, unknown, unknown]
        return pa.table(columns, names=SCHEMA.names).cast(SCHEMA)
    uri = config.images.uri
    assert uri is not None
    unsorted = _table(_without_output(_rows(uri, config.images.uri_column), uri, config.output))
    _check_count(len(unsorted), config, "images.uri", uri)
    return unsorted.sort_by("uri").add_column(0, "image_id", pa.array(np.arange(len(unsorted)))).cast(SCHEMA)


def source_digest(config: Config) -> str:
    """64 hex digits that change when the input does: an image added, removed or changed (size, time), a list edited.

    Usage: ``fingerprint("images", listing.VERSION, {"source": source_digest(config)}, {})``

    Images are listed, not opened; of ready-made embeddings only the files' sizes and times are read.

    Raises:
        InputError: as :func:`list_images`.
    """
    digest = hashlib.sha256()
    if config.embeddings.uri is not None:
        embeddings = open_embeddings(config.embeddings)
        _check_count(embeddings.num_rows, config, "embeddings.uri", config.embeddings.uri)
        for file in embeddings.files:
            digest.update(f"{file.uri}\0{file.size_bytes}\0{file.mtime_ns}\n".encode())
        digest.update(config.images.uri_column.encode())
        return digest.hexdigest()
    table = list_images(config).select(["uri", "size_bytes", "etag"])
    for batch in table.to_batches(max_chunksize=65536):
        columns = [column.cast(pa.string()).fill_null("") for column in batch.columns]
        lines = pc.binary_join_element_wise(*columns, "\0")
        digest.update("\n".join(lines.to_pylist()).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _rows(uri: str, uri_column: str) -> Iterator[Row]:
    filesystem, path = open_uri(uri)
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise InputError(f"images.uri: {uri} cannot be looked at: {error}") from None
    is_parquet = path.lower().endswith((".parquet", ".pq"))
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"images.uri: {uri} does not exist{_close_sibling(filesystem, path)}")
    if info.type == pafs.FileType.Directory and not is_parquet:
        if isinstance(filesystem, pafs.LocalFileSystem):
            return _local_folder(Path(path), uri)
        return _remote_folder(filesystem, path, uri)
    folder = str(PurePosixPath(path).parent)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        folder = uri.split("?")[0].rstrip("/").rpartition("/")[0]
    if is_parquet:
        return _stat_each(_parquet_list(filesystem, path, uri, uri_column), folder)
    if path.lower().endswith(".txt"):
        return _stat_each(_text_list(filesystem, path, uri), folder)
    raise InputError(f"images.uri: {uri} is one file; name a folder of images, or a list of them (.txt or .parquet)")


def _without_output(rows: Iterator[Row], uri: str, output: str) -> Iterator[Row]:
    """Leave out what lies under `output`: the report's pictures are no images of the collection."""
    folder, results = (place.rstrip("/") if "://" in place else Folder.at(place).uri for place in (uri, output))
    if folder == results:
        raise InputError(f"output: {output} is the folder of the images; name another, for example {output}-clusters")
    if not results.startswith(f"{folder}/"):
        return rows
    prefix = local_uri(results) + "/"
    return (row for row in rows if not row[0].startswith(prefix))


def _table(rows: Iterator[Row]) -> pa.Table:
    uris, sizes, etags = [], [], []
    for uri, size, etag in rows:
        uris.append(uri)
        sizes.append(size)
        etags.append(etag)
    columns = [pa.array(uris, pa.string()), pa.array(sizes, pa.int64()), pa.array(etags, pa.string())]
    return pa.table(columns, names=["uri", "size_bytes", "etag"])


def _check_count(num_images: int, config: Config, setting: str, uri: str) -> None:
    if num_images < config.num_clusters:
        raise InputError(
            f"{setting}: {uri} holds {num_images} images, fewer than num_clusters ({config.num_clusters}): "
            "lower num_clusters, or add images"
        )


def _local_folder(folder: Path, uri: str) -> Iterator[Row]:
    others: Counter[str] = Counter()
    found = False
    for entry in _walk(str(folder), frozenset()):
        ending = os.path.splitext(entry.name)[1].lower()
        if ending not in IMAGE_ENDINGS:
            others[ending or "none"] += 1
            continue
        found = True
        try:
            status = entry.stat()
        except OSError:  # a link to nowhere: the embed stage says so
            yield local_uri(entry.path), None, None
            continue
        yield local_uri(entry.path), status.st_size, str(status.st_mtime_ns)
    if not found:
        raise _no_images(uri, others)


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[os.DirEntry[str]]:
    """All visible files below `folder`. Links are followed, but not into a folder that is being walked already."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"images.uri: the folder {folder} cannot be read: {error.strerror}") from None
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    for entry in visible:
        if entry.is_dir():
            yield from _walk(entry.path, above | {identity})
        elif entry.is_file() or entry.is_symlink():
            yield entry


def _remote_folder(filesystem: pafs.FileSystem, path: str, uri: str) -> Iterator[Row]:
    try:
        infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    except OSError as error:
        raise InputError(f"images.uri: {uri} cannot be listed: {error}") from None
    base, _, query = uri.partition("?")
    others: Counter[str] = Counter()
    found = False
    for info in infos:
        below = info.path[len(path) :].strip("/")
        if info.type != pafs.FileType.File or any(step.startswith(".") for step in below.split("/")):
            continue
        ending = PurePosixPath(below).suffix.lower()
        if ending not in IMAGE_ENDINGS:
            others[ending or "none"] += 1
            continue
        found = True
        mtime = None if info.mtime_ns is None else str(info.mtime_ns)
        yield f"{base.rstrip('/')}/{below}" + (f"?{query}" if query else ""), info.size, mtime
    if not found:
        raise _no_images(uri, others)


def _text_list(filesystem: pafs.FileSystem, path: str, uri: str) -> list[str]:
    try:
        with filesystem.open_input_file(path) as file:
            lines = file.read().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"images.uri: the list {uri} cannot be read as UTF-8 text: {error}") from None
    entries = [line.strip() for line in lines]
    entries = [entry for entry in entries if entry and not entry.startswith("#")]
    if not entries:
        raise InputError(f"images.uri: the list {uri} names no images; write one path or URI per line")
    return entries


def _parquet_list(filesystem: pafs.FileSystem, path: str, uri: str, column: str) -> list[str]:
    try:
        schema = pq.read_schema(path, filesystem=filesystem) if filesystem.get_file_info(path).is_file else None
        if schema is not None:
            find_field(schema, column, uri, "images.uri_column")
        table = pq.read_table(path, filesystem=filesystem, columns=[column])
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"images.uri: the list {uri} cannot be read as Parquet: {error}") from None
    field = find_field(table.schema, column, uri, "images.uri_column")
    if not is_string(field.type):
        raise InputError(f"images.uri_column: {column!r} in {uri} is {field.type}, not text")
    entries: list[str | None] = table[column].cast(pa.string()).to_pylist()
    missing = [row for row, entry in enumerate(entries) if not entry]
    if missing:
        raise InputError(
            f"images.uri_column: {column!r} in {uri} is empty in {len(missing)} rows, first row {missing[0]}"
        )
    if not entries:
        raise InputError(f"images.uri: the list {uri} has no rows")
    return [entry for entry in entries if entry]


def _stat_each(entries: list[str], folder: str) -> Iterator[Row]:
    for uri in dict.fromkeys(_resolve(entry, folder) for entry in entries):
        if "://" in uri and not uri.startswith("file://"):
            yield uri, None, None
            continue
        try:
            status = os.stat(local_path(uri))
        except (OSError, ValueError):  # ValueError: a NUL in the name
            yield uri, None, None
            continue
        yield uri, status.st_size, str(status.st_mtime_ns)


def _resolve(entry: str, folder: str) -> str:
    if entry.startswith("file://"):
        return local_uri(os.fsdecode(local_path(entry)))
    if "://" in entry:
        return entry
    if "://" in folder and not entry.startswith("/"):
        return f"{folder}/{entry}"
    return os.path.normpath(os.path.join(folder, os.path.expanduser(entry)))


def local_uri(path: str) -> str:
    """A local path as it stands in the tables: itself, or where it is not valid UTF-8 a percent-encoded file:// URI."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return Path(path).as_uri()
    return path


def local_path(uri: str) -> str | bytes:
    """The local path that :func:`local_uri` made `uri` of."""
    return unquote_to_bytes(urlsplit(uri).path) if uri.startswith("file://") else uri


def _no_images(uri: str, others: Counter[str]) -> InputError:
    wanted = ", ".join(ending[1:] for ending in IMAGE_ENDINGS)
    if not others:
        return InputError(f"images.uri: the folder {uri} holds no files; looked for {wanted}, in subfolders too")
    seen = ", ".join(f"{count} x {ending}" for ending, count in others.most_common(5))
    return InputError(
        f"images.uri: no images in {uri}. Looked for {wanted}, in subfolders too; "
        f"saw {others.total()} other files by ending: {seen}"
    )


def _close_sibling(filesystem: pafs.FileSystem, path: str) -> str:
    parent = PurePosixPath(path).parent
    if not isinstance(filesystem, pafs.LocalFileSystem) or not os.path.isdir(parent):
        return ""
    close = difflib.get_close_matches(PurePosixPath(path).name, os.listdir(parent), n=1)
    return f"; did you mean {parent / close[0]}?" if close else ""
