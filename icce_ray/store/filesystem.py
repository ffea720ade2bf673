"""Folders on any storage that ``pyarrow.fs`` opens: local disks, S3 and compatible stores, Google Cloud Storage.

Writes are atomic: local files are written under a temporary name and renamed, and object stores put whole objects. On
object stores every call has time limits, and waits while the store is away.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from icce_ray.config import StorageConfig
from icce_ray.config.section import is_utf8
from icce_ray.errors import InputError
from icce_ray.store import s3
from icce_ray.store.cache import UNFINISHED, replacing
from icce_ray.store.patient_filesystem import PatientFileSystem, within

OBJECT_STORES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
"""Schemes that :func:`open_uri` takes, besides local paths and ``file``."""
REMOVE_THREADS = 8
OPTIONS = re.compile(r"(.*?)((?:\?[a-z_]+=[^/?]*)?)", re.DOTALL)
"""A remote location and its options, as pyarrow knows them. The names of objects may hold any character."""
S3_ATTEMPTS = 2
"""How often pyarrow tries each call. PatientFileSystem repeats the calls in turn."""
GS_RETRY_S = 4
"""Google's client would retry for 15 minutes by itself."""
_from_uri = pafs.FileSystem.from_uri


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of `uri` and the path in it. Local paths may be relative. Raises InputError: pyarrow cannot open
    it; ConfigError: as :func:`s3.split_uri`."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).absolute())
    if s3.is_s3(uri):
        bucket, key = s3.split_uri(uri)
        options = s3.current_options()
        return _s3(os.getpid(), options, s3.endpoint_url(options), bucket), f"{bucket}/{key}".rstrip("/")
    try:
        return _from_uri(uri) if uri.startswith("file://") else _remote_path(uri)
    except (pa.ArrowInvalid, OSError, ValueError, ImportError) as error:
        reason = str(error)
        if redacted(uri) != uri:
            reason = "the location holds credentials; give them in the environment"
        elif uri.partition("://")[0] not in ("file", *OBJECT_STORES):
            reason = f"supported are local paths and {', '.join(f'{scheme}://' for scheme in OBJECT_STORES)}"
        raise InputError(f"{redacted(uri)}: cannot be opened as a storage location: {reason}") from None


@functools.lru_cache(maxsize=16)
def _s3(process: int, options: StorageConfig, endpoint: str | None, bucket: str) -> pafs.FileSystem:
    parts = urlsplit(endpoint) if endpoint else None
    filesystem = pafs.S3FileSystem(
        **s3.credentials(options),
        anonymous=options.anonymous,
        region=s3.region_name(options),
        scheme=parts.scheme if parts else None,
        endpoint_override=parts.netloc + parts.path.rstrip("/") if parts else None,
        connect_timeout=s3.CONNECT_TIMEOUT_S,
        request_timeout=s3.READ_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        allow_delayed_open=True,
    )
    return pafs.PyFileSystem(PatientFileSystem(filesystem, f"s3://{bucket}", bucket))


def _remote_path(uri: str) -> tuple[pafs.FileSystem, str]:
    scheme, _, rest = uri.partition("://")
    rest, query = OPTIONS.fullmatch(rest).groups()  # type: ignore[union-attr]
    authority, _, key = rest.partition("/")
    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:
        query += f"{'&' if query else '?'}retry_limit_seconds={GS_RETRY_S}"
    filesystem, root = _remote(os.getpid(), f"{scheme}://{authority}/{query}")
    return filesystem, f"{root}/{key}".rstrip("/") if root else key


@functools.lru_cache(maxsize=16)
def _remote(process: int, uri: str) -> tuple[pafs.FileSystem, str]:
    filesystem, root = within(s3.READ_TIMEOUT_S, lambda: _from_uri(uri))
    root = root.rstrip("/")
    return pafs.PyFileSystem(PatientFileSystem(filesystem, str(store_of(uri)), root)), root


def store_of(uri: str) -> str | None:
    """The bucket, container or server of a remote URI, as a URI; None if it is a local path."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return None
    return f"{scheme}://{rest.partition('/')[0].partition('?')[0]}"


def check_store(uri: str, options: StorageConfig, setting: str = "") -> None:
    """Fail within seconds if the store of a remote URI cannot be reached: later calls would wait for it. Raises
    InputError: there is no such bucket, credentials are refused or missing, or nothing answers."""
    try:
        if s3.is_s3(uri):
            s3.check_bucket(uri, options)
        elif store_of(uri) is not None:
            filesystem, path = open_uri(uri)
            filesystem.handler.check(path)
    except InputError as error:
        raise InputError(f"{setting}: {error}" if setting else str(error)) from None


def redacted(uri: str) -> str:
    """`uri` without user, password, and the query of a web address, which may hold a signature."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return uri
    if scheme in OBJECT_STORES:  # elsewhere a password may hold a slash
        place, slash, path = rest.partition("/")
    else:
        place, slash, path = rest.partition("?")
        path = slash and "..."
    user, at, host = place.rpartition("@")
    return f"{scheme}://{f'...@{host}' if at and user != 'anonymous' else place}{slash}{path}"


@dataclass(frozen=True)
class Folder:
    """A folder of a filesystem. It need not exist; writing a file creates it. It can be pickled."""

    filesystem: pafs.FileSystem
    path: str
    uri: str
    s3_options: StorageConfig | None = None
    """Set if the folder is on S3."""
    claim: str | None = field(default=None, compare=False)
    """Id of the claim under which parts are written here, see :func:`icce_ray.store.claim.check_claim`."""

    @classmethod
    def at(cls, uri: str | Path) -> Folder:
        if not is_utf8(str(uri)):
            raise InputError(f"{str(uri)!r} is not valid UTF-8; rename it, or lead to it by a link")
        filesystem, path = open_uri(str(uri))
        is_local = isinstance(filesystem, pafs.LocalFileSystem)
        options = s3.current_options() if s3.is_s3(str(uri)) else None
        return cls(filesystem, path.rstrip("/") or "/", path if is_local else str(uri).rstrip("/"), options)

    @classmethod
    def reachable(cls, uri: str | Path) -> Folder:
        """:meth:`at`, for the first look of a command. Raises InputError: as :func:`check_store`."""
        folder = cls.at(uri)
        check_store(folder.uri, s3.current_options())
        return folder

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.filesystem, f"{self.path}/{name}", f"{self.uri}/{name}", self.s3_options)

    @property
    def parent(self) -> Folder:
        path, uri = self.path.rpartition("/")[0], self.uri.rpartition("/")[0]
        return Folder(self.filesystem, path, uri, self.s3_options)

    @property
    def local_path(self) -> Path | None:
        """The folder as a local path, or None if it is on remote storage."""
        return Path(self.path) if isinstance(self.filesystem, pafs.LocalFileSystem) else None

    def file_uri(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def size(self, name: str) -> int | None:
        """Size of the file `name` in bytes, or None if there is none."""
        if self.s3_options is not None:
            try:
                return int(self._ask_s3("head_object", name)["ContentLength"])
            except FileNotFoundError:
                return None
        info = self.filesystem.get_file_info(f"{self.path}/{name}")
        return info.size if info.type == pafs.FileType.File else None

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def names(self) -> list[str]:
        """Names of the files in the folder, sorted, without unfinished writes."""
        return sorted(name for name in self.sizes(recursive=False) if not name.startswith("."))

    def folder_names(self) -> list[str]:
        """Names of the folders in the folder, sorted."""
        if self.s3_options is not None:
            pages = s3.list_pages(f"{self.uri}/", self.s3_options, Delimiter="/")
            found = [entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", ())]
            return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in found)
        infos = self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def sizes(self, *, recursive: bool = True) -> dict[str, int]:
        """Size in bytes of each file in the folder and below it, by name, from a single listing."""
        if self.s3_options is not None:
            start = len(s3.split_uri(f"{self.uri}/")[1])
            pages = s3.list_pages(f"{self.uri}/", self.s3_options, **({} if recursive else {"Delimiter": "/"}))
            return {entry["Key"][start:]: entry["Size"] for page in pages for entry in page.get("Contents", ())}
        infos = self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True, recursive=recursive))
        start = len(self.path.rstrip("/")) + 1
        return {info.path[start:]: info.size for info in infos if info.type == pafs.FileType.File}

    def read_bytes(self, name: str, num_bytes: int | None = None) -> bytes:
        """Content of a file. On S3, an answer that is not as long as expected is requested again. Raises
        FileNotFoundError if there is none."""
        if self.s3_options is not None:
            return s3.get_object(self.file_uri(name), self.s3_options, num_bytes)
        with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
            return bytes(file.read())

    def read_start(self, name: str, num_bytes: int) -> bytes:
        """The first bytes of a file, fewer if it is shorter. Raises FileNotFoundError if there is none."""
        with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
            return bytes(file.read(num_bytes))

    def write_bytes(self, name: str, data: bytes | memoryview, *, wait: bool = True) -> None:
        """Write a file atomically: readers see the old content or the new. `name` may contain folders. With `wait`,
        wait for a store that is away."""
        if self.s3_options is not None:
            self._ask_s3("put_object", name, None if wait else 0.0, Body=bytes(data))
        else:
            with self.writing(name) as file:
                file.write(data)

    @contextmanager
    def writing(self, name: str, finish: Callable[[Path, Path], object] = os.replace) -> Iterator[Any]:
        """A file object to write a file of any size with. On a local disk, `finish` gives the file its name when all of
        it is there; elsewhere an error leaves an unfinished file."""
        if self.local_path is None:
            with self.filesystem.open_output_stream(f"{self.path}/{name}") as stream:
                yield stream
            return
        target = self.local_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target, finish) as temporary, temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def create_bytes(self, name: str, data: bytes | memoryview) -> None:
        """Create a file. If several processes try at once, one succeeds; storage other than local disks and S3 has no
        conditional put, and there a check is followed by a write. Raises FileExistsError: the file exists."""
        if self.s3_options is not None:
            self._ask_s3("put_object", name, Body=bytes(data), IfNoneMatch="*")
        elif self.local_path is None and self.exists(name):
            raise FileExistsError(self.file_uri(name))
        else:
            with self.writing(name, _link_or_move) as file:
                file.write(data)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        if self.s3_options is not None:
            self._ask_s3("delete_object", name)
        elif self.exists(name):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def remove_unfinished(self) -> None:
        """Remove what killed processes left of files that they were writing, in the folder and below it. Only for who
        knows that nobody else writes there now. Object stores have no such files."""
        for folder, _, names in os.walk(self.local_path) if self.local_path else ():
            for name in filter(UNFINISHED.fullmatch, names):
                Path(folder, name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the folder and all files in it, finished or not."""
        if self.s3_options is not None:
            with ThreadPoolExecutor(REMOVE_THREADS) as threads:
                list(threads.map(self.remove, self.sizes()))
        elif self.filesystem.get_file_info(self.path).type == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.path)

    def _ask_s3(self, method: str, name: str, max_wait_s: float | None = None, **arguments: Any) -> Any:
        """Call a method of boto3's client with a file's object, as :func:`s3.patiently`."""
        assert self.s3_options is not None
        bucket, key = s3.split_uri(self.file_uri(name))
        ask = getattr(s3.client(self.s3_options), method)
        return s3.patiently(self.file_uri(name), lambda: ask(Bucket=bucket, Key=key, **arguments), max_wait_s)


def _link_or_move(temporary: Path, target: Path) -> None:
    """Give a finished file its name, if no file has it. Raises FileExistsError: the name is taken."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:
        # A filesystem without hard links. An empty file that is created exclusively reserves the name.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        temporary.replace(target)
