"""Walk the headers of a tar shard, past damage, links and concatenated archives.

:mod:`tarfile` parses each header here, but its own walk stops without an error at a damaged header and at the end mark
of the first of several archives, follows a negative size backwards, and reads extended headers of any size.
"""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

from icce_ray.config.section import is_utf8
from icce_ray.images.image_formats import LFS_POINTER, LFS_REMEDY

BLOCK_BYTES = tarfile.BLOCKSIZE
MAX_EXTENSION_BYTES = 2**20
"""Largest extended header (a long name, pax records). Names take a few hundred bytes."""
LONG_NAMES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
EXTENSIONS = (*LONG_NAMES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
"""Types of headers that describe the next member."""
MAX_LENGTH_DIGITS = 20
ZEROS = "zeros where members may have been"
NO_DATA = (tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
FAR_BYTES = 2**20
"""Data of this size is skipped: another request takes less time than reading on."""
NEAR_WINDOW_BYTES = 4 * 2**20
FAR_WINDOW_BYTES = 2**16
"""Enough for the headers and labels between two large images."""
NOT_TAR = {
    b"\x1f\x8b": "compressed with gzip: unpack it to a plain .tar",
    b"BZh": "compressed with bzip2: unpack it to a plain .tar",
    b"\xfd7zXZ": "compressed with xz: unpack it to a plain .tar",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it to a plain .tar",
    b"\x04\x22\x4d\x18": "compressed with lz4: unpack it to a plain .tar",
    b"PK\x03\x04": "a zip archive: repack it as a plain .tar",
    LFS_POINTER: LFS_REMEDY,
}
"""Other files than tar shards, by their first bytes."""
RECORD_BYTES = tarfile.RECORDSIZE
"""An archive is filled up with zeros to a multiple of this."""


class RemoteHeaders:
    """Reads the headers of a tar on remote storage (pyarrow's file) in as few bytes and requests as go together: past
    small members it reads on, past large ones it leaps."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._position = self._last = self._start = 0
        self._window = b""

    def seek(self, position: int, /) -> int:
        self._position = position
        return position

    def read(self, num_bytes: int, /) -> bytes:
        start, end = self._position, self._position + num_bytes
        if start < self._start or end > self._start + len(self._window):
            window_bytes = FAR_WINDOW_BYTES if start - self._last > FAR_BYTES else NEAR_WINDOW_BYTES
            self._start, self._window = start, self._file.read_at(max(num_bytes, window_bytes), start)
        data = self._window[start - self._start : end - self._start]
        self._last = self._position = start + len(data)
        return data


class Member(NamedTuple):
    """A regular file in the tar, whose bytes begin at `start`."""

    name: str
    start: int
    num_bytes: int


class Link(NamedTuple):
    """A hard or symbolic link to another member."""

    name: str
    target: str


class Damage(NamedTuple):
    """Bytes that belong to no readable member."""

    start: int
    num_bytes: int
    reason: str


def walk(file: Any, file_bytes: int) -> Iterator[Member | Link | Damage]:
    """All members in order. Behind a damaged header, the next valid one is searched block by block. A complete shard
    ends with an end mark (a block of zeros). If the file does not, the last item is a Damage, and so is a member that
    reaches beyond its `file_bytes`."""
    if file_bytes == 0:
        yield Damage(0, 0, "empty file")
        return
    position, bad, reason = 0, -1, ""
    first, end = 0, -1  # where this archive begins, and the zeros behind it
    extended: dict[str, str] = {}
    while position < file_bytes:
        file.seek(position)
        block = file.read(BLOCK_BYTES)
        if position == 0 and (reason := next((NOT_TAR[magic] for magic in NOT_TAR if block.startswith(magic)), "")):
            yield Damage(0, file_bytes, reason)
            return
        if bad < 0 and len(block) == BLOCK_BYTES and not any(block):
            end = position if end < 0 else end
            position += BLOCK_BYTES
            continue
        if bad < 0 <= end:
            if position - end <= 2 * BLOCK_BYTES or (position - first) % RECORD_BYTES == 0:
                first = position
            else:
                yield Damage(end, position - end, ZEROS)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if header.type in EXTENSIONS:
                extended |= _read_extension(file, header, file_bytes - position - BLOCK_BYTES)
                num_bytes = header.size
            else:
                is_link = header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE)
                num_bytes = 0 if is_link or header.type in NO_DATA else int(extended.get("size", header.size))
            if num_bytes < 0:
                raise ValueError("negative size")
            if num_bytes > file_bytes - position - BLOCK_BYTES:
                raise ValueError("cut off")
        except (tarfile.HeaderError, ValueError) as error:
            if bad < 0:
                bad, reason = position, _reason(error, block)
            extended = {}
            position += BLOCK_BYTES
            continue
        if bad >= 0:
            yield Damage(bad, position - bad, reason)
            bad = -1
        end = -1
        start = position + BLOCK_BYTES
        position = start + -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if header.type in EXTENSIONS:
            continue
        name = extended.get("path", header.name)
        if is_link:
            target = extended.get("linkpath", header.linkname)
            if header.type == tarfile.SYMTYPE:
                target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
            yield Link(_utf8(name), _utf8(target))
        elif header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in extended):
            yield Damage(start, num_bytes, "sparse member: not supported")
        elif header.type not in NO_DATA:
            yield Member(_utf8(name), start, num_bytes)
        extended = {}
    if bad >= 0:
        yield Damage(bad, file_bytes - bad, reason)
    elif end < 0:
        yield Damage(file_bytes, 0, "no end mark: it was cut off or not closed")
    elif file_bytes - end > RECORD_BYTES + BLOCK_BYTES:
        yield Damage(end, file_bytes - end, ZEROS)


def _read_extension(file: Any, header: tarfile.TarInfo, num_left: int) -> dict[str, str]:
    """The names and sizes that an extended header states for the next member."""
    if not 0 <= header.size <= MAX_EXTENSION_BYTES:
        raise ValueError("extended header of absurd size")
    if header.size > num_left:
        raise ValueError("cut off")
    data = file.read(header.size)
    if header.type in LONG_NAMES:
        return {LONG_NAMES[header.type]: data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    if header.type == tarfile.XGLTYPE:  # defaults for all members: none that matters here
        return {}
    records, data, start = dict[str, str](), data.rstrip(b"\0"), 0
    while start < len(data):
        length = int(data[start : start + MAX_LENGTH_DIGITS].partition(b" ")[0])
        key, equals, value = data[start : start + max(length, 0)].partition(b" ")[2].partition(b"=")
        if not equals or start + length > len(data):
            raise ValueError("bad extended header")
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        start += length
    return records


def _reason(error: Exception, block: bytes) -> str:
    reason = str(error) if len(block) == BLOCK_BYTES else "cut off"
    return reason if reason in ("cut off", "negative size", "extended header of absurd size") else "bad header"


def _utf8(name: str) -> str:
    """The name without a leading ``./``, percent-encoded if it is not valid UTF-8."""
    name = name.removeprefix("./")
    return name if is_utf8(name) else quote(name.encode("utf-8", "surrogateescape"))
