"""Walk a local folder: each real folder once, and each file with what tells whether it is the same file elsewhere.

What this engine wrote itself is no image, though it may lie among them.
"""

import heapq
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from icce_ray.errors import InputError
from icce_ray.images.file_shards import File
from icce_ray.images.uris import is_remote, local_path, local_uri
from icce_ray.store.run_records import LATEST_FOLDER, RUNS_FOLDER

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
UNREADABLE_FOLDER = "folder not readable"
RESULT_FOLDERS = (
    "images", "embed", "sample", "cluster_count", "neighbors", "method", "consensus", "corrections", "classifier",
    "assign", "evaluate", "report", "silhouette_spaces", "trial_scores", "sweep", "comparison",
)  # fmt: skip
"""Folders of an output whose subfolders hold artifacts."""
RUN_FOLDERS = (RUNS_FOLDER, LATEST_FOLDER)
RESULT = re.compile(rf"/(?:{'|'.join(RUN_FOLDERS)}|(?:{'|'.join(RESULT_FOLDERS)})/[0-9a-f]{{16}})/")


def local_file(uri: str, is_linked: bool = False) -> File:
    """The local file `uri`; one with a problem if it cannot be read as a file. Never opens it."""
    path = local_path(uri)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return File(uri, None, None, problem="missing")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return File(uri, None, None, problem=f"unreadable: {reason}")
    if not stat.S_ISREG(status.st_mode):
        problem = f"not a file: {KINDS.get(stat.S_IFMT(status.st_mode), 'of another kind')}"
        return File(uri, None, None, problem=problem)
    identity = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}" if status.st_ino else None
    return File(uri, status.st_size, str(status.st_mtime_ns), False, None, identity, is_linked or os.path.islink(path))


def walk_folder(folder: str, excluded: frozenset[tuple[int, int]], skipped: Counter[str]) -> Iterator[File]:
    """All visible files below `folder`, in no particular order.

    Each real folder is walked once, by device and inode, whatever leads to it: first what lies below `folder`, then the
    targets of links, in the order of the links' paths. So links in circles end. A folder that cannot be read, a link
    that leads nowhere, and a file that is none are files with a problem; what is left out is counted in `skipped`, but
    for the `excluded` folders. Raises InputError: `folder` itself cannot be read."""
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
            elif entry.is_symlink() and os.path.isdir(entry.path):
                heapq.heappush(links, entry.path)
            else:
                yield local_file(local_uri(entry.path), is_linked)


def is_result(uri: str, output: str) -> bool:
    """Whether a remote file was written to the output folder `output` by this engine."""
    root = output.rstrip("/")
    return uri.startswith(root) and RESULT.match(uri, len(root)) is not None


def result_folders(output: str) -> frozenset[tuple[int, int]]:
    """What this engine wrote to a local output: (device, inode) of each folder of an artifact, that of the run records
    and the one that ``latest`` leads to."""
    if is_remote(output):
        return frozenset()
    root, found = Path(output).expanduser(), set[tuple[int, int]]()
    folders = [root / name for name in RUN_FOLDERS]
    for stage in RESULT_FOLDERS:
        with suppress(OSError):
            folders += [folder for folder in (root / stage).iterdir() if RESULT.match(f"/{stage}/{folder.name}/")]
    for folder in folders:
        with suppress(OSError):
            status = folder.stat()
            found.add((status.st_dev, status.st_ino))
    return frozenset(found)
