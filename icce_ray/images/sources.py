"""The files that `images.uri` names: what lies in folders and prefixes, what lists name. Nothing is opened but lists.

A file is an image, or a container of images (a tar shard, a Parquet file), which :mod:`icce_ray.images.containers`
looks into. Everything is streamed: no list of all names is held.
"""

from __future__ import annotations

import difflib
import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.config import ImagesConfig
from icce_ray.embed.ready_made import find_field, is_string
from icce_ray.errors import InputError
from icce_ray.store import s3
from icce_ray.store.filesystem import open_uri

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TAR_ENDING = ".tar"
PARQUET_ENDINGS = (".parquet", ".pq")
LIST_BATCH_ROWS = 65536


class File(NamedTuple):
    """A file, and what tells whether it changed."""

    uri: str
    size_bytes: int | None
    etag: str | None
    """Object stores: the ETag or time. Local files: the time of the last change in ns. None: unknown."""
    is_container: bool = False


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def iter_files(images: ImagesConfig) -> Iterator[File]:
    """The files of all of `images.uris`, in no order; one that two sources name comes twice.

    Raises:
        InputError: nothing there, no images, or a list that cannot be read.
    """
    for uri in images.uris:
        yield from _source_files(uri, images)


def _source_files(uri: str, images: ImagesConfig) -> Iterator[File]:
    filesystem, path = open_uri(uri)
    kind, info = _look(filesystem, path, uri)
    is_parquet = path.lower().endswith(PARQUET_ENDINGS)
    if kind == pafs.FileType.NotFound:
        raise InputError(f"images.uri: {uri} does not exist{_close_sibling(filesystem, path)}")
    if kind == pafs.FileType.Directory:
        if isinstance(filesystem, pafs.LocalFileSystem):
            entries = _local_files(Path(path))
        elif s3.is_s3(uri):
            entries = _s3_files(uri)
        else:
            entries = _remote_files(filesystem, path, uri)
        if is_parquet:
            return _parquet_files([file for file in entries if file.uri.lower().endswith(PARQUET_ENDINGS)], images)
        return _folder(entries, uri, images)
    this = File(local_uri(path) if isinstance(filesystem, pafs.LocalFileSystem) else uri, info.size, _mtime(info))
    if is_parquet:
        return _parquet_files([this], images)
    if path.lower().endswith(TAR_ENDING):
        return iter([this._replace(is_container=True)])
    if path.lower().endswith(".txt"):
        return _stat_each(_text_list(filesystem, path, uri), _parent(uri, path))
    raise InputError(
        f"images.uri: {uri} is one file; name a folder of images, a .tar or .parquet that holds them, or a list of "
        "them (.txt or .parquet)"
    )


def _look(filesystem: pafs.FileSystem, path: str, uri: str) -> tuple[pafs.FileType, pafs.FileInfo]:
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise InputError(f"images.uri: {uri} cannot be looked at: {error}") from None
    if info.type == pafs.FileType.NotFound and s3.is_s3(uri) and uri.endswith("/"):
        return pafs.FileType.Directory, info
    return info.type, info


def _folder(entries: Iterator[File], uri: str, images: ImagesConfig) -> Iterator[File]:
    """Images and tar shards; where there are neither, Parquet files."""
    others: Counter[str] = Counter()
    tables: list[File] = []
    found = False
    for file in entries:
        ending = PurePosixPath(file.uri).suffix.lower()
        if ending in IMAGE_ENDINGS or ending == TAR_ENDING:
            found = True
            yield file._replace(is_container=ending == TAR_ENDING)
            continue
        others[ending or "none"] += 1
        if ending in PARQUET_ENDINGS and not found:
            tables.append(file)
    if not found and tables:
        yield from _parquet_files(tables, images)
    elif not found:
        raise _no_images(uri, others)


def _local_files(folder: Path) -> Iterator[File]:
    for entry in _walk(str(folder), frozenset()):
        try:
            status = entry.stat()
        except OSError:  # a link to nowhere: the embed stage says so
            yield File(local_uri(entry.path), None, None)
            continue
        yield File(local_uri(entry.path), status.st_size, str(status.st_mtime_ns))


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


def _s3_files(uri: str) -> Iterator[File]:
    bucket, prefix = s3.split_uri(uri)
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    try:
        for key, size, etag in s3.list_objects(f"s3://{bucket}/{prefix}", s3.current_options()):
            if not key.endswith("/") and not _is_hidden(key[len(prefix) :]):
                yield File(f"s3://{bucket}/{key}", size, etag)
    except OSError as error:
        raise InputError(f"images.uri: {uri} cannot be listed: {error}") from None


def _remote_files(filesystem: pafs.FileSystem, path: str, uri: str) -> Iterator[File]:
    """Folder by folder: pyarrow lists a folder as a whole."""
    base, _, query = uri.partition("?")
    pending = [path]
    while pending:
        folder = pending.pop()
        try:
            infos = filesystem.get_file_info(pafs.FileSelector(folder))
        except OSError as error:
            raise InputError(f"images.uri: {uri} cannot be listed: {error}") from None
        for info in infos:
            below = info.path[len(path) :].strip("/")
            if _is_hidden(below):
                continue
            if info.type == pafs.FileType.Directory:
                pending.append(info.path)
            elif info.type == pafs.FileType.File:
                name = f"{base.rstrip('/')}/{below}" + (f"?{query}" if query else "")
                yield File(name, info.size, _mtime(info))


def _is_hidden(below: str) -> bool:
    return any(step.startswith(".") for step in below.split("/"))


def _mtime(info: pafs.FileInfo) -> str | None:
    return None if info.mtime_ns is None else str(info.mtime_ns)


def _text_list(filesystem: pafs.FileSystem, path: str, uri: str) -> Iterator[str]:
    found = False
    try:
        with filesystem.open_input_file(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
            for line in lines:
                entry = line.strip()
                if entry and not entry.startswith("#"):
                    found = True
                    yield entry
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"images.uri: the list {uri} cannot be read as UTF-8 text: {error}") from None
    if not found:
        raise InputError(f"images.uri: the list {uri} names no images; write one path or URI per line")


def _parquet_files(files: list[File], images: ImagesConfig) -> Iterator[File]:
    """Each file is a list of URIs, or a container of images."""
    if not files:
        raise InputError(f"images.uri: {', '.join(images.uris)}: no .parquet files there")
    for file in sorted(files):
        filesystem, path = open_uri(str(local_path_or_uri(file.uri)))
        try:
            schema = pq.read_schema(path, filesystem=filesystem)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"images.uri: the list {file.uri} cannot be read as Parquet: {error}") from None
        if image_column(schema, images, file.uri) is not None:
            yield file._replace(is_container=True)
        else:
            entries = _parquet_list(filesystem, path, file.uri, images.uri_column)
            yield from _stat_each(entries, _parent(file.uri, path))


def image_column(schema: pa.Schema, images: ImagesConfig, uri: str) -> str | None:
    """The column that holds image files, or None where the file is a list of URIs.

    Raises:
        InputError: `images.bytes_column` is not there or of another type; neither URIs nor image files are there.
    """
    if images.bytes_column is not None:
        field = find_field(schema, images.bytes_column, uri, "images.bytes_column")
        if not _holds_bytes(field.type):
            raise InputError(f"images.bytes_column: {field.name!r} in {uri} is {field.type}, not binary")
        return images.bytes_column
    if images.uri_column in schema.names:
        return None
    found: list[str] = [field.name for field in schema if _holds_bytes(field.type)]
    if len(found) > 1:
        raise InputError(f"images.uri: {uri} has the binary columns {', '.join(found)}: name images.bytes_column")
    if not found:
        find_field(schema, images.uri_column, uri, "images.uri_column")
    return found[0]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _parquet_list(filesystem: pafs.FileSystem, path: str, uri: str, column: str) -> Iterator[str]:
    row = 0
    with filesystem.open_input_file(path) as opened:
        file = pq.ParquetFile(opened)
        field = find_field(file.schema_arrow, column, uri, "images.uri_column")
        if not is_string(field.type):
            raise InputError(f"images.uri_column: {column!r} in {uri} is {field.type}, not text")
        if file.metadata.num_rows == 0:
            raise InputError(f"images.uri: the list {uri} has no rows")
        for batch in file.iter_batches(LIST_BATCH_ROWS, columns=[column]):
            entries: list[str | None] = batch.column(0).cast(pa.string()).to_pylist()
            for entry in entries:
                if not entry:
                    raise InputError(f"images.uri_column: {column!r} in {uri} is empty, first row {row}")
                row += 1
                yield str(entry)


def _parent(uri: str, path: str) -> str:
    return uri.split("?")[0].rstrip("/").rpartition("/")[0] if is_remote(uri) else str(PurePosixPath(path).parent)


def _stat_each(entries: Iterator[str], folder: str) -> Iterator[File]:
    for entry in entries:
        uri = _resolve(entry, folder)
        is_container = uri.lower().endswith(TAR_ENDING)
        if is_remote(uri):
            yield File(uri, None, None, is_container)
            continue
        try:
            status = os.stat(local_path(uri))
        except (OSError, ValueError):  # ValueError: a NUL in the name
            yield File(uri, None, None)
            continue
        yield File(uri, status.st_size, str(status.st_mtime_ns), is_container)


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


def local_path_or_uri(uri: str) -> str:
    """`uri` as :func:`~icce_ray.store.filesystem.open_uri` takes it."""
    return uri if is_remote(uri) else os.fsdecode(local_path(uri))


def _no_images(uri: str, others: Counter[str]) -> InputError:
    wanted = ", ".join(ending[1:] for ending in (*IMAGE_ENDINGS, TAR_ENDING))
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
