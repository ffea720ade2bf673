"""Folders on anything ``pyarrow.fs`` opens: local disks, S3 and what speaks it, Google Cloud Storage.

A write is seen whole or not at all: local files are written beside their place and renamed, object stores put whole
objects.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from icce_ray.errors import InputError


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem that `uri` names and the path in it. Local paths may be relative and start with ``~``.

    Raises:
        InputError: the scheme is not one that pyarrow opens.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise InputError(f"{uri}: cannot be opened as a storage location: {error}") from None
    return filesystem, path


@dataclass(frozen=True)
class Folder:
    """One folder of a filesystem. It need not exist: writing a file makes it. Pickles, so workers can be handed one."""

    filesystem: pafs.FileSystem
    path: str
    uri: str

    @classmethod
    def at(cls, uri: str | Path) -> Folder:
        filesystem, path = open_uri(str(uri))
        is_local = isinstance(filesystem, pafs.LocalFileSystem)
        return cls(filesystem, path.rstrip("/") or "/", path if is_local else str(uri).rstrip("/"))

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.filesystem, f"{self.path}/{name}", f"{self.uri}/{name}")

    @property
    def local_path(self) -> Path | None:
        """The folder as a path of this machine, or None where it lies on remote storage."""
        return Path(self.path) if isinstance(self.filesystem, pafs.LocalFileSystem) else None

    def file_uri(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of the file `name`, or None where there is no such file."""
        info = self.filesystem.get_file_info(f"{self.path}/{name}")
        return info.size if info.type == pafs.FileType.File else None

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def names(self) -> list[str]:
        """Names of the files in the folder, sorted; unfinished writes are left out."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        files = (info.base_name for info in infos if info.type == pafs.FileType.File)
        return sorted(name for name in files if not name.startswith("."))

    def read_bytes(self, name: str) -> bytes:
        """Whole content of a file. Raises FileNotFoundError where there is none."""
        with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
            return bytes(file.read())

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        """Write a file, atomically: readers see the old content or the new. `name` may lie in a folder below."""
        if self.local_path is None:
            with self.filesystem.open_output_stream(f"{self.path}/{name}") as file:
                file.write(data)
            return
        target = self.local_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        if self.exists(name):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def clear(self) -> None:
        """Remove every file of the folder, finished or not."""
        if self.filesystem.get_file_info(self.path).type == pafs.FileType.Directory:
            self.filesystem.delete_dir_contents(self.path)
