"""The files that `images.uri` names: those in folders and prefixes, and those that lists name.

A file is an image, or a container of images (a tar shard, a Parquet file) that :mod:`icce_ray.images.containers` looks
into. Only lists are opened. Names are streamed, never all in memory.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.config import ImagesConfig
from icce_ray.errors import InputError
from icce_ray.images.parquet_columns import image_column
from icce_ray.images.uri_lists import read_parquet_list, read_text_list
from icce_ray.images.uris import is_remote, local_path, local_path_or_uri, local_uri, resolve
from icce_ray.store import s3
from icce_ray.store.filesystem import open_uri

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TAR_ENDING = ".tar"
PARQUET_ENDINGS = (".parquet", ".pq")


class File(NamedTuple):
    """A file, and what tells whether it changed."""

    uri: str
    size_bytes: int | None
    etag: str | None
    """Object stores: the ETag or modification time. Local files: the modification time in ns. None: unknown."""
    is_container: bool = False


def iter_files(images: ImagesConfig) -> Iterator[File]:
    """The files of all of `images.uris`, in no particular order; a file that two sources name appears twice.

    Raises:
        InputError: nothing there, no images, or a list that cannot be read.
    """
    for uri in images.uris:
        yield from _source_files(uri, images)


def _source_files(uri: str, images: ImagesConfig) -> Iterator[File]:
    filesystem, path = open_uri(uri)
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise InputError(f"images.uri: {uri} cannot be looked at: {error}") from None
    is_prefix = s3.is_s3(uri) and uri.endswith("/")
    is_parquet = path.lower().endswith(PARQUET_ENDINGS)
    if info.type == pafs.FileType.Directory or (info.type == pafs.FileType.NotFound and is_prefix):
        files = _files_below(filesystem, path, uri)
        if is_parquet:
            return _parquet_files([file for file in files if file.uri.lower().endswith(PARQUET_ENDINGS)], images)
        return _folder(files, uri, images)
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"images.uri: {uri} does not exist{_close_sibling(filesystem, path)}")
    file = File(uri if is_remote(uri) else local_uri(path), info.size, _mtime(info))
    if is_parquet:
        return _parquet_files([file], images)
    if path.lower().endswith(TAR_ENDING):
        return iter([file._replace(is_container=True)])
    if path.lower().endswith(".txt"):
        return _listed_files(read_text_list(filesystem, path, uri), file.uri)
    raise InputError(
        f"images.uri: {uri} is one file; name a folder of images, a .tar or .parquet that holds them, or a list of "
        "them (.txt or .parquet)"
    )


def _folder(files: Iterator[File], uri: str, images: ImagesConfig) -> Iterator[File]:
    """Images and tar shards; if there are neither, Parquet files."""
    others: Counter[str] = Counter()
    tables: list[File] = []
    found = False
    for file in files:
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


def _parquet_files(files: list[File], images: ImagesConfig) -> Iterator[File]:
    """Each file is a list of URIs or a container of images."""
    if not files:
        raise InputError(f"images.uri: {', '.join(images.uris)}: no .parquet files there")
    for file in sorted(files):
        filesystem, path = open_uri(local_path_or_uri(file.uri))
        try:
            schema = pq.read_schema(path, filesystem=filesystem)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"images.uri: the list {file.uri} cannot be read as Parquet: {error}") from None
        if image_column(schema, images, file.uri) is not None:
            yield file._replace(is_container=True)
        else:
            yield from _listed_files(read_parquet_list(filesystem, path, file.uri, images.uri_column), file.uri)


def _listed_files(entries: Iterator[str], list_uri: str) -> Iterator[File]:
    """The files that a list names. Remote ones and local ones that do not exist are not checked here."""
    path = list_uri.partition("?")[0] if is_remote(list_uri) else local_path_or_uri(list_uri)
    folder = path.rpartition("/")[0] or "/"
    for entry in entries:
        uri = resolve(entry, folder)
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


def _files_below(filesystem: pafs.FileSystem, path: str, uri: str) -> Iterator[File]:
    """All visible files of a folder and its subfolders."""
    if not is_remote(uri):
        return _local_files(path)
    return _s3_files(uri) if s3.is_s3(uri) else _remote_files(filesystem, path, uri)


def _local_files(folder: str) -> Iterator[File]:
    for entry in _walk(folder, frozenset()):
        try:
            status = entry.stat()
        except OSError:  # a broken link: the embed stage reports it
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
    """Lists folder by folder: pyarrow returns everything below a folder at once."""
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
    parent = Path(path).parent
    if not isinstance(filesystem, pafs.LocalFileSystem) or not parent.is_dir():
        return ""
    close = difflib.get_close_matches(Path(path).name, os.listdir(parent), n=1)
    return f"; did you mean {parent / close[0]}?" if close else ""
