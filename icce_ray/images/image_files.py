"""The files that `images.uri` names: those in folders and prefixes, and those that lists name.

A file is an image, or a container of images (a tar shard, a Parquet file) that :mod:`icce_ray.images.containers` looks
into. Only lists are opened. Names are streamed, never all in memory.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.config import ImagesConfig, ResourcesConfig, StorageConfig
from icce_ray.config.section import MAX_PATH_CHARACTERS, is_utf8
from icce_ray.errors import InputError, message_of
from icce_ray.images.bucket_listing import BucketPrefix
from icce_ray.images.file_kinds import IMAGE_ENDINGS, PARQUET_ENDINGS, TAR_ENDING, describe, ending, remedy, take_file
from icce_ray.images.file_shards import File, FileShards, Shard, shards_of
from icce_ray.images.folder_walk import local_file, walk_folder
from icce_ray.images.inventory import MANIFEST_NAME, open_inventory
from icce_ray.images.job import list_bucket, list_inventory
from icce_ray.images.own_results import is_result, result_folders
from icce_ray.images.parquet_columns import image_column
from icce_ray.images.uri_lists import read_parquet_list, read_text_list
from icce_ray.images.uris import is_remote, local_path_or_uri, local_uri, open_file, resolve
from icce_ray.runtime.progress import Progress
from icce_ray.store import Claim, Folder, s3
from icce_ray.store.filesystem import OBJECT_STORES, open_uri, redacted
from icce_ray.store.part_records import PartRecord

COUNTED_TOGETHER = 1000
MORE_THAN_A_PATH = re.compile(r"^[\"']|\.\w{2,5}[\"']?[\s,;|]")
"""In a line of a list."""


@dataclass(frozen=True)
class Sources:
    """Where the images are, and what listing them takes."""

    images: ImagesConfig
    output: str
    """The output folder. What this engine wrote below it is left out, unless a list names it."""
    folder: Folder
    """Shards of many files are written here."""
    storage: StorageConfig
    resources: ResourcesConfig
    progress: Progress


def list_files(sources: Sources) -> FileShards:
    """The files of all of `images.uris`. Raises InputError: nothing there, no images, or a list that cannot be read."""
    skipped: Counter[str] = Counter()
    shards: list[Shard] = []
    # The claim is that of the folder which `icce-ray gc` and `icce-ray forget` look at.
    try:
        with Claim(sources.folder) if any(map(_is_listed_in_parts, sources.images.uris)) else nullcontext():
            for number, uri in enumerate(sources.images.uris):
                shards += _shards_of_source(uri, f"source-{number}", sources, skipped)
            return FileShards(shards, sources.folder, skipped)
    except PermissionError as error:
        raise InputError(f"output: {sources.output!r} cannot be written to: {error}") from None


def _is_listed_in_parts(uri: str) -> bool:
    return s3.is_s3(uri) or uri.endswith(MANIFEST_NAME)


def _shards_of_source(uri: str, name: str, sources: Sources, skipped: Counter[str]) -> Iterator[Shard]:
    filesystem, path = open_uri(uri)
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise InputError(f"images.uri: {uri} cannot be looked at: {error}") from None
    is_prefix = s3.is_s3(uri) and uri.endswith("/")
    is_parquet = path.lower().endswith(PARQUET_ENDINGS)
    if info.type == pafs.FileType.Directory or (info.type == pafs.FileType.NotFound and is_prefix):
        found = _Folder(uri, sources.images, is_parquet)
        if s3.is_s3(uri):
            yield from _bucket_shards(uri, name, sources, found)
        else:
            below = _files_below(filesystem, path, uri, sources.output, skipped)
            taken = (file for file in map(found.take, _counted(below, sources.progress)) if file is not None)
            yield from shards_of(taken, sources.folder, name)
        try:
            yield from shards_of(found.rest(skipped), sources.folder, f"{name}-tables")
        except InputError:
            # The user will change what lies there: the next run has to look again.
            if found.folder is not None:
                found.folder.clear()
            raise
        return
    if info.type == pafs.FileType.File and info.base_name == MANIFEST_NAME:
        found = _Folder(uri, sources.images, is_parquet=False)
        yield from _inventory_shards(filesystem, path, uri, name, sources, found)
        yield from shards_of(found.rest(skipped), sources.folder, f"{name}-tables")
        return
    yield from shards_of(
        _counted(_named_files(uri, info, sources.images, filesystem), sources.progress), sources.folder, name
    )


def _counted(files: Iterator[File], progress: Progress) -> Iterator[File]:
    for number, file in enumerate(files, 1):
        if number % COUNTED_TOGETHER == 0:
            progress.update(number, None)
        yield file


def _bucket_shards(uri: str, name: str, sources: Sources, found: _Folder) -> Iterator[Shard]:
    bucket, prefix = s3.split_uri(uri)
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    where = f"s3://{bucket}/{prefix}"
    folder = sources.folder / f"{name}-{hashlib.sha256(where.encode()).hexdigest()[:16]}"
    classify = partial(_file_of_bucket, output=sources.output)
    try:
        listed = BucketPrefix(where, folder, sources.storage, classify)
        yield from _recorded(list_bucket(listed, sources.resources, sources.progress), folder, found)
    except OSError as error:
        raise InputError(f"images.uri: {uri} cannot be listed: {error}") from None


def _inventory_shards(
    filesystem: pafs.FileSystem, path: str, uri: str, name: str, sources: Sources, found: _Folder
) -> Iterator[Shard]:
    folder = sources.folder / f"{name}-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"
    classify = partial(_file_of_bucket, output=sources.output)
    inventory = open_inventory(filesystem, path, uri, folder, sources.storage, classify)
    yield from _recorded(list_inventory(inventory, sources.resources, sources.progress), folder, found)


def _recorded(records: list[PartRecord], folder: Folder, found: _Folder) -> Iterator[Shard]:
    """The shards that tasks wrote and recorded."""
    found.folder = folder
    for record in records:
        found.add(Counter(record.metrics["others"]), [File(*file) for file in record.metrics["tables"]])
        for part, (first, last) in zip(record.files, record.metrics["ends"], strict=True):
            found.has_images = True
            yield Shard(first, last, part.rows or 0, None, folder, part.name)


def _file_of_bucket(file: File, others: Counter[str], tables: list[File], output: str) -> File | None:
    return None if is_result(file.uri, output) else take_file(file, others, tables)


class _Folder:
    """What lies in a folder: images, tar shards and Parquet files of images. Other Parquet files count only if there is
    nothing else."""

    def __init__(self, uri: str, images: ImagesConfig, is_parquet: bool) -> None:
        self._uri, self._images, self._is_parquet = uri, images, is_parquet
        self._others: Counter[str] = Counter()
        self._tables: list[File] = []
        self.has_images = False
        self.folder: Folder | None = None
        """Where the shards lie that tasks wrote."""

    def add(self, others: Counter[str], tables: list[File]) -> None:
        self._others += others
        self._tables += tables

    def take(self, file: File) -> File | None:
        taken = take_file(file, self._others, self._tables)
        self.has_images |= taken is not None and taken.problem is None
        return taken

    def rest(self, skipped: Counter[str]) -> Iterator[File]:
        """The files that Parquet files hold or name, once all others are taken."""
        if not self.has_images and (self._tables or self._is_parquet):
            yield from _parquet_files(self._tables, self._images)
        for table in self._tables if self.has_images else ():
            if _holds_images(table, self._images):
                yield table._replace(is_container=True)
            else:
                self._others[".parquet without images"] += 1
        if not self.has_images and not self._tables:
            raise _no_images(self._uri, self._others)
        skipped.update(self._others)


def _named_files(uri: str, info: pafs.FileInfo, images: ImagesConfig, filesystem: pafs.FileSystem) -> Iterator[File]:
    """The files of a source that is a file itself."""
    path = info.path
    if info.type == pafs.FileType.NotFound:
        raise not_found(uri, path, is_local=isinstance(filesystem, pafs.LocalFileSystem))
    if info.type != pafs.FileType.File:
        raise InputError(f"images.uri: {uri} is neither a file nor a folder")
    file = File(uri if is_remote(uri) else local_uri(path), info.size, _mtime(info))
    if path.lower().endswith(PARQUET_ENDINGS):
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


def _holds_images(table: File, images: ImagesConfig) -> bool:
    try:
        with open_file(table.uri) as opened:
            return image_column(pq.read_schema(opened), images, table.uri) is not None
    except (pa.ArrowException, OSError):
        return True  # listed as a damaged container
    except InputError:
        return False


def _parquet_files(files: list[File], images: ImagesConfig) -> Iterator[File]:
    """Each file is a list of URIs or a container of images."""
    if not files:
        raise InputError(f"images.uri: {', '.join(images.uris)}: no .parquet files there")
    unusable: list[File] = []
    for file in sorted(files):
        try:
            with open_file(file.uri) as opened:
                is_list = image_column(pq.read_schema(opened), images, file.uri) is None
            if is_list:
                yield from _listed_files(read_parquet_list(file.uri, images.uri_column), file.uri)
            else:
                yield file._replace(is_container=True)
        except InputError as error:
            if len(files) == 1:
                raise
            unusable.append(file._replace(problem=f"not usable: {error}"))
        except (pa.ArrowException, OSError) as error:
            unusable.append(file._replace(problem=f"damaged Parquet file: {message_of(error)}"))
    if len(unusable) == len(files):
        others = f"; nor can the other {len(files) - 1} be used" if len(files) > 1 else ""
        raise InputError(f"images.uri: {unusable[0].uri}: {unusable[0].problem}{others}")
    yield from unusable


def _listed_files(entries: Iterator[str], list_uri: str) -> Iterator[File]:
    """The files that a list names. Remote ones are not checked here; an entry that cannot be used has a problem."""
    path = list_uri.partition("?")[0] if is_remote(list_uri) else local_path_or_uri(list_uri)
    folder = path.rpartition("/")[0] or "/"
    for number, entry in enumerate(entries):
        if not entry or len(entry) > MAX_PATH_CHARACTERS:
            problem = f"over the limit of {MAX_PATH_CHARACTERS:,} characters" if entry else "empty"
            yield File(f"{list_uri}#{number}/{entry[:100]}", None, None, problem=problem)
            continue
        uri = resolve(entry, folder)
        uri = uri if is_remote(uri) or uri.startswith("file://") else local_uri(uri)
        if not is_utf8(uri):
            name = uri.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            yield File(redacted(name), None, None, problem="not UTF-8; write the list in UTF-8")
            continue
        is_container = uri.lower().endswith(TAR_ENDING)
        scheme = uri.partition("://")[0]
        if uri.lower().endswith(PARQUET_ENDINGS):
            yield File(uri, None, None, problem="a Parquet file in a list; name it in images.uri")
        elif not is_remote(uri):
            file = local_file(uri)
            if file.problem == "missing" and MORE_THAN_A_PATH.search(entry):
                file = file._replace(problem="missing: write one path a line, without quotes, labels or comments")
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
        return walk_folder(path, result_folders(output), skipped)
    files = _remote_files(filesystem, path, uri, skipped)
    return (file for file in files if not is_result(file.uri, output))


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


def not_found(uri: str, path: str, *, is_local: bool) -> InputError:
    """What to say of a source that is not there: with a hint at a name close to it on this machine."""
    parent, hint = Path(path).parent, ""
    if any(character in path for character in "*?["):
        hint = "; patterns are not expanded: name the folder, below which every image is taken, or a list of images"
    elif is_local and parent.is_dir():
        close = difflib.get_close_matches(Path(path).name, os.listdir(parent), n=1)
        hint = f"; did you mean {parent / close[0]}?" if close else ""
    return InputError(f"images.uri: {uri} does not exist{hint}")
