"""This machine's files that its processes share: a lock between them, writes seen whole or not, and a cache of what can
be made again: copies of remote parts, and parts joined to one file.

Each entry of the cache is a folder, ``<cache>/<kind>/<name>``. Files are sealed with their checksum, and one that does
not match is made again. Entries that nobody used for long, or that fill the disk, are removed.
"""

import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from icce_ray.errors import ResourceError

UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}", re.DOTALL)
"""The names that :func:`replacing` writes to. A process that is killed meanwhile leaves such a file."""


@contextmanager
def replacing(path: Path, finish: Callable[[Path, Path], object] = os.replace) -> Iterator[Path]:
    """A path to write to that becomes `path` at the end, or vanishes after an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        finish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The checksum of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file for this machine's other processes; the kernel lets go of it when a holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


MAX_UNUSED_S = 14 * 86_400.0
IN_USE_S = 3_600.0
"""Entries that were used so lately are never removed."""
MAX_SHARE = 0.5
"""The cache may take this share of the space that would be free without it."""
SCRATCH = "scratch"


def cache_folder() -> Path:
    """ICCE_CACHE, or a folder of this user below the temporary folder. Raises ResourceError: the latter belongs to
    somebody else, who could put anything there."""
    if configured := os.environ.get("ICCE_CACHE"):
        return Path(configured)
    folder = Path(tempfile.gettempdir()) / f"icce_ray-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    with suppress(FileNotFoundError):
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise ResourceError(f"{folder} is not a folder of yours; set ICCE_CACHE to one that is")
    return folder


def cache_entry(kind: str, name: str) -> Path:
    """The folder of an entry, which counts as used now. If it is new, room is made for it."""
    folder = cache_folder() / kind / name
    try:
        os.utime(folder)
    except FileNotFoundError:
        _remove_unused(folder.parent.parent)
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def seal(path: Path) -> None:
    """Note the checksum of a finished file."""
    _seal_of(path).write_text(sha256_of(path))


def is_sealed(path: Path) -> bool:
    """Whether the file has the bytes that were sealed. It is read once in each process."""
    try:
        status = path.stat()
        key = (str(path), status.st_size, status.st_mtime_ns, status.st_ino)
        if key not in _checked:
            if _seal_of(path).read_text() != sha256_of(path):
                return False
            _checked.add(key)
    except FileNotFoundError:
        return False
    return True


_checked: set[tuple[str, int, int, int]] = set()


def _seal_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for as long as the block runs. Those of processes that were killed are removed on the way."""
    root = cache_folder() / SCRATCH
    root.mkdir(parents=True, exist_ok=True)
    for lock in root.glob("*.lock"):
        with suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
    folder = root / uuid.uuid4().hex
    lock = folder.with_suffix(".lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _remove_unused(root: Path) -> None:
    entries = []
    for folder in root.glob("*/*"):
        with suppress(OSError):
            if folder.parent.name != SCRATCH and folder.is_dir() and not folder.is_symlink():
                files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
                entries.append((folder.stat().st_mtime, sum(files), folder))
    total, now = sum(num_bytes for _, num_bytes, _ in entries), time.time()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    allowed = MAX_SHARE * (shutil.disk_usage(existing).free + total)
    for used, num_bytes, folder in sorted(entries):
        if now - used > MAX_UNUSED_S or (total > allowed and now - used > IN_USE_S):
            shutil.rmtree(folder, ignore_errors=True)
            total -= num_bytes
