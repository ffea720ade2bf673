"""URIs of files: remote ones, and local paths as the tables hold them; and lists of them: a text file with one path or
URI per line, or a Parquet file with a column of them."""

import codecs
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from icce_ray.config.section import is_utf8
from icce_ray.errors import InputError
from icce_ray.images.parquet_columns import PARQUET_ENDINGS, check_column, find_field, is_string, open_column
from icce_ray.store.filesystem import open_uri

BATCH_ROWS = 65_536
# The first place counts: the name of a member is the archive's, and may look like another place.
TAR_MEMBER = re.compile(r"^(?P<file>.*?\.tar)#(?P<offset>\d+)\+(?P<size>\d+)/(?P<name>.*)$", re.DOTALL | re.IGNORECASE)
PARQUET_MEMBER = re.compile(r"^(?P<file>.*?\.(?:parquet|pq))#(?P<row>\d+)/(?P<column>.*)$", re.DOTALL | re.IGNORECASE)


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def local_uri(path: str) -> str:
    """A local path as the tables hold it: unchanged, or a percent-encoded file:// URI if it is not valid UTF-8 or reads
    like a place in a container."""
    is_plain = is_utf8(path) and not TAR_MEMBER.match(path) and not PARQUET_MEMBER.match(path)
    return path if is_plain else Path(path).as_uri()


def local_path(uri: str) -> str | bytes:
    """The local path that :func:`local_uri` turned into `uri`."""
    return unquote_to_bytes(urlsplit(uri).path) if uri.startswith("file://") else uri


def local_path_or_uri(uri: str) -> str:
    """`uri` as :func:`~icce_ray.store.filesystem.open_uri` takes it."""
    return uri if is_remote(uri) else os.fsdecode(local_path(uri))


def open_file(uri: str) -> Any:
    """A file as pyarrow's, to read from any place in it."""
    filesystem, path = open_uri(local_path_or_uri(uri))
    return filesystem.open_input_file(path if is_utf8(path) else os.fsencode(path))


def resolve(entry: str, folder: str) -> str:
    """An entry of a list in `folder` as a URI. It is a path, absolute or relative to the folder, or a URI; it may be a
    place in a container."""
    if entry.startswith("file://"):
        return local_uri(os.fsdecode(local_path(entry)))
    if "://" in entry:
        return entry
    if "://" in folder and not entry.startswith("/"):
        return f"{folder}/{entry}"
    path = os.path.normpath(os.path.join(folder, os.path.expanduser(entry)))
    return path if is_utf8(path) else local_uri(path)


def read_text_list(filesystem: pafs.FileSystem, path: str, uri: str) -> Iterator[str]:
    """The entries of a text list, without blank lines and comments. Bytes that are not UTF-8 become surrogates. Raises
    InputError: it cannot be read, or has no entries."""
    found = False
    try:
        with filesystem.open_input_file(path) as file:
            encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
            file.seek(0)
            for line in io.TextIOWrapper(file, encoding, "surrogateescape"):
                entry = line.strip()
                if entry and not entry.startswith("#"):
                    found = True
                    yield entry
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"images.uri: the list {uri} cannot be read as text: {error}") from None
    if not found:
        raise InputError(f"images.uri: the list {uri} names no images; write one path or URI per line")


def read_parquet_list(uri: str, column: str) -> Iterator[str]:
    """The entries of a Parquet list, as of a text list; empty text for a null. Raises InputError: no such column, a
    column of another type, or no rows."""
    with open_file(uri) as opened:
        file = open_column(opened, column)
        field = find_field(file.schema_arrow, column, uri, "images.uri_column")
        if not is_string(field.type):
            raise InputError(f"images.uri_column: {column!r} in {uri} is {field.type}, not text")
        if file.metadata.num_rows == 0:
            raise InputError(f"images.uri: the list {uri} has no rows")
        try:
            check_column(file, column)
        except ValueError as error:
            raise InputError(f"images.uri: the list {uri} is not read: {error}") from None
        for batch in file.iter_batches(BATCH_ROWS, columns=[column]):
            shared = batch.column(0)
            values = shared.dictionary.cast(pa.string()).cast(pa.binary()).to_pylist()
            texts = [(value or b"").decode("utf-8", "surrogateescape").strip() for value in values]
            for index in shared.indices.to_pylist():
                yield "" if index is None else texts[index]


def named_images(uri: str, column: str) -> Iterator[str]:
    """The URIs of the images that a list names, in its order: a .parquet file with `column`, or a text file. Raises
    InputError: the list does not exist or cannot be read."""
    filesystem, path = open_uri(uri)
    if filesystem.get_file_info(path).type != pafs.FileType.File:
        raise InputError(f"embeddings.images: {uri} is no file; give a .txt or .parquet list of the images")
    folder = uri.rpartition("/")[0] if is_remote(uri) else path.rpartition("/")[0] or "/"
    is_parquet = path.lower().endswith(PARQUET_ENDINGS)
    entries = read_parquet_list(uri, column) if is_parquet else read_text_list(filesystem, path, uri)
    for row, entry in enumerate(entries):
        resolved = resolve(entry, folder)
        if not entry or not is_utf8(resolved):
            raise InputError(f"embeddings.images: {uri}, entry {row}: {'not UTF-8' if entry else 'empty'}")
        yield resolved
