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
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.config import Config, ImagesConfig
from icce_ray.config.section import MAX_PATH_CHARACTERS, is_utf8
from icce_ray.errors import InputError, message_of
from icce_ray.images.bucket_listing import BucketPrefix
from icce_ray.images.file_kinds import TAR_ENDING, describe, ending, remedy, take_file
from icce_ray.images.file_shards import File, FileShards, Shard, shards_of
from icce_ray.images.folder_walk import is_result, local_file, result_folders, walk_folder
from icce_ray.images.image_formats import IMAGE_ENDINGS
from icce_ray.images.inventory import MANIFEST_NAME, open_inventory
from icce_ray.images.parquet_columns import PARQUET_ENDINGS, image_column
from icce_ray.images.uris import (
    is_remote,
    local_path_or_uri,
    local_uri,
    open_file,
    read_parquet_list,
    read_text_list,
    resolve,
)
from icce_ray.runtime.progress import Progress
from icce_ray.store import Claim, Folder, s3
from icce_ray.store.filesystem import OBJECT_STORES, open_uri, redacted

COUNTED_TOGETHER = 1000
MORE_THAN_A_PATH = re.compile(r"^[\"']|\.\w{2,5}[\"']?[\s,;|]")
"""A line of a list that is not a path alone."""


def list_files(config: Config, folder: Folder, progress: Progress) -> FileShards:
    """The files of all of `images.uris`; shards of many lie in `folder`. What this engine wrote to the output is left
    out, unless a list names it. Raises InputError: nothing there, no images, or a list that cannot be read."""
    skipped, shards = Counter[str](), list[Shard]()
    is_listed_in_parts = any(s3.is_s3(uri) or uri.endswith(MANIFEST_NAME) for uri in config.images.uris)
    # The claim is that of the folder which `icce-ray gc` and `icce-ray forget` look at.
    try:
        with Claim(folder) if is_listed_in_parts else nullcontext():
            for number, uri in enumerate(config.images.uris):
                shards += _Source(uri, f"source-{number}", config, folder, progress, skipped).shards()
            return FileShards(shards, folder, skipped)
    except PermissionError as error:
        raise InputError(f"output: {config.output!r} cannot be written to: {error}") from None


class _Source:
    """One of `images.uris`. In a folder, images, tar shards and Parquet files of images are taken; other Parquet files
    only if there is nothing else."""

    def __init__(
        self, uri: str, name: str, config: Config, folder: Folder, progress: Progress, skipped: Counter[str]
    ) -> None:
        self._uri, self._name, self._config, self._folder = uri, name, config, folder
        self._progress, self._skipped = progress, skipped
        self._filesystem, self._path = open_uri(uri)
        self._others, self._tables, self._has_images = Counter[str](), list[File](), False

    def shards(self) -> Iterator[Shard]:
        try:
            info = self._filesystem.get_file_info(self._path)
        except OSError as error:
            raise InputError(f"images.uri: {self._uri} cannot be looked at: {error}") from None
        is_prefix = info.type == pafs.FileType.NotFound and s3.is_s3(self._uri) and self._uri.endswith("/")
        is_inventory = info.type == pafs.FileType.File and info.base_name == MANIFEST_NAME
        if info.type != pafs.FileType.Directory and not is_prefix and not is_inventory:
            yield from self._sorted(self._named_files(info), self._name)
            return
        listed = None
        if s3.is_s3(self._uri) or is_inventory:
            where = self._uri if is_inventory else f"s3://{'/'.join(s3.split_uri(self._uri)).rstrip('/')}/"
            listed = self._folder / f"{self._name}-{hashlib.sha256(where.encode()).hexdigest()[:16]}"
            yield from self._listed_in_parts(where, listed, is_inventory)
        else:
            below = self._remote_files()
            if not is_remote(self._uri):
                below = walk_folder(self._path, result_folders(self._config.output), self._skipped)
            yield from self._sorted(filter(None, map(self._take, below)), self._name)
        try:
            yield from self._sorted(self._rest(), f"{self._name}-tables")
        except InputError:
            if listed is not None:  # the user will change what lies there: the next run has to look again
                listed.clear()
            raise

    def _sorted(self, files: Iterator[File], name: str) -> Iterator[Shard]:
        def counted() -> Iterator[File]:
            for number, file in enumerate(files, 1):
                if number % COUNTED_TOGETHER == 0:
                    self._progress.update(number, None)
                yield file

        return shards_of(counted(), self._folder, name)

    def _take(self, file: File) -> File | None:
        taken = take_file(file, self._others, self._tables)
        self._has_images |= taken is not None and taken.problem is None
        return taken

    def _listed_in_parts(self, where: str, folder: Folder, is_inventory: bool) -> Iterator[Shard]:
        """The shards that tasks wrote and recorded."""
        from icce_ray.images.job import list_bucket, list_inventory

        config, classify = self._config, partial(_file_of_bucket, output=self._config.output)
        try:
            if is_inventory:
                inventory = open_inventory(self._filesystem, self._path, where, folder, config.storage, classify)
                records = list_inventory(inventory, config.resources, self._progress)
            else:
                prefix = BucketPrefix(where, folder, config.storage, classify)
                records = list_bucket(prefix, config.resources, self._progress)
        except OSError as error:
            raise InputError(f"images.uri: {self._uri} cannot be listed: {error}") from None
        for record in records:
            self._others += Counter(record.metrics["others"])
            self._tables += [File(*file) for file in record.metrics["tables"]]
            for part, (first, last) in zip(record.files, record.metrics["ends"], strict=True):
                self._has_images = True
                yield Shard(first, last, part.rows or 0, None, folder, part.name)

    def _remote_files(self) -> Iterator[File]:
        """All visible files of a folder and its subfolders, but no results. Lists folder by folder: pyarrow returns
        everything below a folder at once."""
        base, _, query = self._uri.partition("?")
        pending = [self._path]
        while pending:
            try:
                infos = self._filesystem.get_file_info(pafs.FileSelector(pending.pop()))
            except OSError as error:
                raise InputError(f"images.uri: {self._uri} cannot be listed: {error}") from None
            for info in infos:
                below = info.path[len(self._path) :].strip("/")
                name = f"{base.rstrip('/')}/{below}" + (f"?{query}" if query else "")
                if any(step.startswith(".") for step in below.split("/")):
                    self._skipped["hidden"] += 1
                elif info.type == pafs.FileType.Directory:
                    pending.append(info.path)
                elif info.type == pafs.FileType.File and not is_result(name, self._config.output):
                    yield File(name, info.size, _mtime(info))

    def _rest(self) -> Iterator[File]:
        """The files that Parquet files hold or name, once all others are taken."""
        images = self._config.images
        if not self._has_images and (self._tables or self._path.lower().endswith(PARQUET_ENDINGS)):
            yield from _parquet_files(self._tables, images)
        for table in self._tables if self._has_images else ():
            if _holds_images(table, images):
                yield table._replace(is_container=True)
            else:
                self._others[".parquet without images"] += 1
        if not self._has_images and not self._tables:
            wanted = ", ".join(known[1:] for known in (*IMAGE_ENDINGS, TAR_ENDING))
            if not self._others:
                raise InputError(
                    f"images.uri: the folder {self._uri} holds no files; looked for {wanted}, in subfolders too"
                )
            raise InputError(
                f"images.uri: no images in {self._uri}. Looked for {wanted}, in subfolders too; "
                f"saw {self._others.total()} other files: {describe(self._others)}"
            )
        self._skipped.update(self._others)

    def _named_files(self, info: pafs.FileInfo) -> Iterator[File]:
        """The files of a source that is a file itself."""
        uri, path = self._uri, info.path
        if info.type == pafs.FileType.NotFound:
            raise not_found(uri, path, is_local=isinstance(self._filesystem, pafs.LocalFileSystem))
        if info.type != pafs.FileType.File:
            raise InputError(f"images.uri: {uri} is neither a file nor a folder")
        file = File(uri if is_remote(uri) else local_uri(path), info.size, _mtime(info))
        if path.lower().endswith(PARQUET_ENDINGS):
            return _parquet_files([file], self._config.images)
        if path.lower().endswith(TAR_ENDING):
            return iter([file._replace(is_container=True)])
        if path.lower().endswith(".txt"):
            return _listed_files(read_text_list(self._filesystem, path, uri), file.uri)
        if what_to_do := remedy(ending(path)):
            raise InputError(f"images.uri: {uri} is a {ending(path)} file: {what_to_do}")
        raise InputError(
            f"images.uri: {uri} is one file; name a folder of images, a .tar or .parquet that holds them, or a list of "
            "them (.txt or .parquet)"
        )


def _file_of_bucket(file: File, others: Counter[str], tables: list[File], output: str) -> File | None:
    return None if is_result(file.uri, output) else take_file(file, others, tables)


def _is_list(table: File, images: ImagesConfig) -> bool:
    """Whether a Parquet file is a list of URIs. Raises as :func:`image_column`, or what reading its schema raises."""
    with open_file(table.uri) as opened:
        return image_column(pq.read_schema(opened), images, table.uri) is None


def _holds_images(table: File, images: ImagesConfig) -> bool:
    try:
        return not _is_list(table, images)
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
            if _is_list(file, images):
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


def _mtime(info: pafs.FileInfo) -> str | None:
    return None if info.mtime_ns is None else str(info.mtime_ns)


def not_found(uri: str, path: str, *, is_local: bool) -> InputError:
    """The error for a source that is not there, with a hint at a close name on this machine."""
    parent, hint = Path(path).parent, ""
    if any(character in path for character in "*?["):
        hint = "; patterns are not expanded: name the folder, below which every image is taken, or a list of images"
    elif is_local and parent.is_dir():
        close = difflib.get_close_matches(Path(path).name, os.listdir(parent), n=1)
        hint = f"; did you mean {parent / close[0]}?" if close else ""
    return InputError(f"images.uri: {uri} does not exist{hint}")
