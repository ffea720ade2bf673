"""URIs of files: remote ones, and local paths as the tables hold them."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def local_uri(path: str) -> str:
    """A local path as the tables hold it: unchanged, or a percent-encoded file:// URI if it is not valid UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return Path(path).as_uri()
    return path


def local_path(uri: str) -> str | bytes:
    """The local path that :func:`local_uri` turned into `uri`."""
    return unquote_to_bytes(urlsplit(uri).path) if uri.startswith("file://") else uri


def local_path_or_uri(uri: str) -> str:
    """`uri` as :func:`~icce_ray.store.filesystem.open_uri` takes it."""
    return uri if is_remote(uri) else os.fsdecode(local_path(uri))


def resolve(entry: str, folder: str) -> str:
    """An entry of a list as a URI.

    Args:
        entry: a path, absolute or relative to `folder`, or a URI.
        folder: path or URI of the folder that the list lies in.
    """
    if entry.startswith("file://"):
        return local_uri(os.fsdecode(local_path(entry)))
    if "://" in entry:
        return entry
    if "://" in folder and not entry.startswith("/"):
        return f"{folder}/{entry}"
    return os.path.normpath(os.path.join(folder, os.path.expanduser(entry)))
