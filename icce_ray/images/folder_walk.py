"""Walk a local folder: each real folder once, and each file with what tells whether it is the same file elsewhere."""

import heapq
import os
import stat
from collections import Counter
from collections.abc import Iterator

from icce_ray.errors import InputError
from icce_ray.images.file_shards import File
from icce_ray.images.uris import local_path, local_uri

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
UNREADABLE_FOLDER = "folder not readable"


def local_file(uri: str, is_linked: bool = False) -> File:
    """The local file `uri`; one with a problem if it cannot be read as a file. Never opens it."""
    path = local_path(uri)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return File(uri, None, None, problem=why_not(error))
    if not stat.S_ISREG(status.st_mode):
        problem = f"not a file: {KINDS.get(stat.S_IFMT(status.st_mode), 'of another kind')}"
        return File(uri, None, None, problem=problem)
    identity = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}" if status.st_ino else None
    return File(uri, status.st_size, str(status.st_mtime_ns), False, None, identity, is_linked or os.path.islink(path))


def why_not(error: Exception) -> str:
    """Why a path cannot be used."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"unreadable: {reason}"


def walk_folder(folder: str, excluded: frozenset[tuple[int, int]], skipped: Counter[str]) -> Iterator[File]:
    """All visible files below `folder`, in no particular order.

    Each real folder is walked once, by device and inode, whatever leads to it: first what lies below `folder`, then the
    targets of links, in the order of the links' paths. So links in circles end. A folder that cannot be read, a link
    that leads nowhere, and a file that is none are files with a problem. Raises InputError: `folder` itself cannot be
    read.

    Args:
        excluded: (device, inode) of folders that are left out.
        skipped: counts what is left out, by kind.
    """
    seen: set[tuple[int, int] | str] = set()
    folders = [(folder, False)]
    links: list[str] = []
    while folders or links:
        path, is_linked = folders.pop() if folders else (heapq.heappop(links), True)
        try:
            status = os.stat(path)
            identity = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)
            if identity in seen:
                skipped["link to a folder that is listed already"] += 1
                continue
            seen.add(identity)
            if identity in excluded:
                continue
            with os.scandir(path) as entries:
                found = list(entries)
        except OSError as error:
            if path == folder:
                raise InputError(f"images.uri: the folder {folder} cannot be read: {error.strerror}") from None
            yield File(local_uri(path), None, None, problem=f"{UNREADABLE_FOLDER}: {error.strerror}")
            continue
        for entry in found:
            if entry.name.startswith("."):
                skipped["hidden"] += 1
            elif entry.is_dir(follow_symlinks=False):
                folders.append((entry.path, is_linked))
            elif _is_folder(entry):
                heapq.heappush(links, entry.path)
            else:
                yield local_file(local_uri(entry.path), is_linked)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, a loop, an overlong target
        return False


def identity_of(folder: str) -> tuple[int, int] | None:
    """(device, inode) of a folder, or None if there is none."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino
