"""The files that `images.uri` names: those in folders and prefixes, and those that lists name.

A file is an image, or a container of images (a tar shard, a Parquet file) that :mod:`icce_ray.images.containers` looks
into. Only lists are opened. Names are streamed, never all in memory.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from PIL import features

from icce_ray.config import ImagesConfig
from icce_ray.errors import InputError
from icce_ray.images.file_table import File
from icce_ray.images.folder_walk import UNREADABLE_FOLDER, identity_of, local_file, walk_folder
from icce_ray.images.parquet_columns import image_column
from icce_ray.images.skipped_files import describe, ending, remedy
from icce_ray.images.uri_lists import read_parquet_list, read_text_list
from icce_ray.images.uris import is_remote, local_path_or_uri, local_uri, resolve
from icce_ray.store import s3
from icce_ray.store.filesystem import OBJECT_STORES, open_uri, redacted

IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".jpx", ".jpf", ".pbm", ".pgm", ".ppm", ".pnm"),
    *((".avif",) if features.check("avif") else ()),
)
TAR_ENDING = ".tar"
PARQUET_ENDINGS = (".parquet", ".pq")
RESULT_FOLDERS = (
    "images",
    "embed",
    "sample",
    "cluster_count",
    "neighbors",
    "method",
    "consensus",
    "classifier",
    "assign",
    "evaluate",
    "report",
    "silhouette_spaces",
    "trial_scores",
    "sweep",
)
"""Folders of an output whose subfolders hold artifacts."""
RESULT = re.compile(rf"/(?:runs|(?:{'|'.join(RESULT_FOLDERS)})/[0-9a-f]{{16}})/")


def iter_files(images: ImagesConfig, output: str, skipped: Counter[str]) -> Iterator[File]:
    """The files of all of `images.uris`, in no particular order; a file that two sources name appears twice.

    What this engine wrote below `output` is left out, unless a list names it.

    Args:
        output: the output folder.
        skipped: counts what lies there besides, by ending or kind.

    Raises:
        InputError: nothing there, no images, or a list that cannot be read.
    """
    for uri in images.uris:
        yield from _source_files(uri, images, output, skipped)


def _source_files(uri: str, images: ImagesConfig, output: str, skipped: Counter[str]) -> Iterator[File]:
    filesystem, path = open_uri(uri)
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise InputError(f"images.uri: {uri} cannot be looked at: {error}") from None
    is_prefix = s3.is_s3(uri) and uri.endswith("/")
    is_parquet = path.lower().endswith(PARQUET_ENDINGS)
    if info.type == pafs.FileType.Directory or (info.type == pafs.FileType.NotFound and is_prefix):
        files = _files_below(filesystem, path, uri, output, skipped)
        if is_parquet:
            return _parquet_files([file for file in files if file.uri.lower().endswith(PARQUET_ENDINGS)], images)
        return _folder(files, uri, images, skipped)
    if info.type == pafs.FileType.NotFound:
        is_pattern = any(character in path for character in "*?[")
        hint = "; patterns are not expanded: name the folder, below which every image is taken, or a list of images"
        raise InputError(f"images.uri: {uri} does not exist{hint if is_pattern else _close_sibling(filesystem, path)}")
    if info.type != pafs.FileType.File:
        raise InputError(f"images.uri: {uri} is neither a file nor a folder")
    file = File(uri if is_remote(uri) else local_uri(path), info.size, _mtime(info))
    if is_parquet:
        return _parquet_files([file], images)
    if path.lower().endswith(TAR_ENDING):
        return iter([file._replace(is_container=True)])
    if path.lower().endswith(".txt"):
        return _listed_files(read_text_list(filesystem, path, uri), file.uri)
    if what_to_do := remedy(ending(path)):
        raise InputError(f"images.uri: {uri} is a {ending(path)} file: {what_to_do}")
    raise InputError(
        f"images.uri: {uri} is one file; name a folder of images, a .tar or .parquet that holds them, or a list of "
        "them (.txt or .parquet)"
    )


def _folder(files: Iterator[File], uri: str, images: ImagesConfig, skipped: Counter[str]) -> Iterator[File]:
    """Images, tar shards and Parquet files of images. Other Parquet files count only if there is nothing else."""
    others: Counter[str] = Counter()
    tables: list[File] = []
    found = False
    for file in files:
        kind = ending(file.uri)
        if file.problem is not None:
            # A broken link without an ending may have led to a folder of images.
            if kind in (*IMAGE_ENDINGS, TAR_ENDING, "") or file.problem.startswith(UNREADABLE_FOLDER):
                yield file
            others[file.problem] += 1
        elif kind in IMAGE_ENDINGS or kind == TAR_ENDING:
            found = True
            yield file._replace(is_container=kind == TAR_ENDING)
        elif kind in PARQUET_ENDINGS:
            tables.append(file)
        else:
            others[kind or "no ending"] += 1
    if not found and tables:
        yield from _parquet_files(tables, images)
    elif tables:
        for table in tables:
            if _holds_images(table, images):
                yield table._replace(is_container=True)
            else:
                others[".parquet without images"] += 1
    elif not found:
        raise _no_images(uri, others)
    skipped.update(others)


def _holds_images(table: File, images: ImagesConfig) -> bool:
    filesystem, path = open_uri(local_path_or_uri(table.uri))
    try:
        return image_column(pq.read_schema(path, filesystem=filesystem), images, table.uri) is not None
    except (pa.ArrowException, OSError):
        return True  # listed as a damaged container
    except InputError:
        return False


def _parquet_files(files: list[File], images: ImagesConfig) -> Iterator[File]:
    """Each file is a list of URIs or a container of images."""
    if not files:
        raise InputError(f"images.uri: {', '.join(images.uris)}: no .parquet files there")
    damaged: list[File] = []
    for file in sorted(files):
        filesystem, path = open_uri(local_path_or_uri(file.uri))
        try:
            schema = pq.read_schema(path, filesystem=filesystem)
            if image_column(schema, images, file.uri) is not None:
                yield file._replace(is_container=True)
            else:
                yield from _listed_files(read_parquet_list(filesystem, path, file.uri, images.uri_column), file.uri)
        except (pa.ArrowException, OSError) as error:
            if is_remote(file.uri) and not isinstance(error, pa.ArrowException):
                raise InputError(f"images.uri: the list {file.uri} cannot be read: {error}") from None
            reason = " ".join(str(error).split())[:200]
            damaged.append(file._replace(problem=f"damaged Parquet file: {reason}"))
    if len(damaged) == len(files):
        raise InputError(f"images.uri: {damaged[0].uri} cannot be read as Parquet: {damaged[0].problem}")
    yield from damaged


def _listed_files(entries: Iterator[str], list_uri: str) -> Iterator[File]:
    """The files that a list names. Remote ones are not checked here; an entry that cannot be used has a problem."""
    path = list_uri.partition("?")[0] if is_remote(list_uri) else local_path_or_uri(list_uri)
    folder = path.rpartition("/")[0] or "/"
    for entry in entries:
        uri = resolve(entry, folder)
        is_container = uri.lower().endswith(TAR_ENDING)
        scheme = uri.partition("://")[0]
        if not is_remote(uri):
            file = local_file(uri)
            yield file._replace(is_container=is_container and file.problem is None)
        elif scheme not in OBJECT_STORES:
            problem = f"{scheme[:20]}:// is not supported; copy the image to a folder or a bucket"
            yield File(redacted(uri), None, None, problem=problem)
        elif redacted(uri) != uri:
            yield File(redacted(uri), None, None, problem="credentials in the entry; give them in the environment")
        else:
            yield File(uri, None, None, is_container)


def _files_below(
    filesystem: pafs.FileSystem, path: str, uri: str, output: str, skipped: Counter[str]
) -> Iterator[File]:
    """All visible files of a folder and its subfolders, but no results."""
    if not is_remote(uri):
        return walk_folder(path, _result_folders(output), skipped)
    results = output.rstrip("/")
    files = _s3_files(uri, skipped) if s3.is_s3(uri) else _remote_files(filesystem, path, uri, skipped)
    return (file for file in files if not (file.uri.startswith(results) and RESULT.match(file.uri, len(results))))


def _result_folders(output: str) -> frozenset[tuple[int, int]]:
    """What the engine wrote: (device, inode) of each folder of an artifact and of that of the run records."""
    if is_remote(output):
        return frozenset()
    root = Path(output).expanduser()
    folders = [root / "runs"]
    for stage in RESULT_FOLDERS:
        with suppress(OSError):
            folders += [folder for folder in (root / stage).iterdir() if RESULT.match(f"/{stage}/{folder.name}/")]
    identities = (identity_of(str(folder)) for folder in folders)
    return frozenset(identity for identity in identities if identity is not None)


def _s3_files(uri: str, skipped: Counter[str]) -> Iterator[File]:
    bucket, prefix = s3.split_uri(uri)
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    try:
        for key, size, etag in s3.list_objects(f"s3://{bucket}/{prefix}", s3.current_options()):
            if _is_hidden(key[len(prefix) :]):
                skipped["hidden"] += 1
            elif not key.endswith("/"):
                yield File(f"s3://{bucket}/{key}", size, etag)
    except OSError as error:
        raise InputError(f"images.uri: {uri} cannot be listed: {error}") from None


def _remote_files(filesystem: pafs.FileSystem, path: str, uri: str, skipped: Counter[str]) -> Iterator[File]:
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
                skipped["hidden"] += 1
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
    wanted = ", ".join(known[1:] for known in (*IMAGE_ENDINGS, TAR_ENDING))
    if not others:
        return InputError(f"images.uri: the folder {uri} holds no files; looked for {wanted}, in subfolders too")
    return InputError(
        f"images.uri: no images in {uri}. Looked for {wanted}, in subfolders too; "
        f"saw {others.total()} other files: {describe(others)}"
    )


def _close_sibling(filesystem: pafs.FileSystem, path: str) -> str:
    parent = Path(path).parent
    if not isinstance(filesystem, pafs.LocalFileSystem) or not parent.is_dir():
        return ""
    close = difflib.get_close_matches(Path(path).name, os.listdir(parent), n=1)
    return f"; did you mean {parent / close[0]}?" if close else ""
