"""URIs of files: remote ones, and local paths as the tables hold them."""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from icce_ray.config.section import is_utf8
from icce_ray.store.filesystem import open_uri

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
